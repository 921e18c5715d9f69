"""Whether a run fits, and that what the plan advises really makes it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.errors import ConfigError
from torchspec.core.pipeline import inprocess
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.plan import make_plan
from torchspec.core.pipeline.plan_advice import fit_of
from torchspec.core.pipeline.plan_fit import Advice, Fit
from torchspec.core.pipeline.plan_load import GB, Lengths, Subject
from torchspec.core.pipeline.preflight import check

Fitted = Callable[..., Fit]


@pytest.fixture
def fitted(make_config: Any, tmp_path: Path) -> Fitted:
    """fitted("section.key=value", ..., ranks=n): the fit of the tiny run without the process around it."""

    def fit(*words: str, ranks: int = 1, lengths: Lengths | None = None) -> Fit:
        config, _ = make_config(tmp_path / "run", *words, train={"batch_size": 4})
        place = Ranks(all=ranks, here=ranks)
        checked = check(config, place, to_run=False)
        return fit_of(checked.config, place, _without_process(checked.subject(lengths)))

    return fit


def _without_process(subject: Subject) -> Subject:
    """A test's process is of any size."""
    return replace(subject, models=replace(subject.models, process=None))


def applied(fitted: Fitted, words: tuple[str, ...], advice: Advice, ranks: int) -> Fit:
    """The fit of the configuration that the advice's own words make."""
    changes = list(advice.changes)
    for change in advice.changes:
        if change.startswith("--nproc"):
            changes.remove(change)
            ranks = int(change.split()[1])
    return fitted(*words, *changes, ranks=ranks)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_advice_that_is_followed_makes_it_fit(fitted: Fitted, ranks: int, packed: bool) -> None:
    words = (
        "data.max_length=512",
        "train.loss_memory_mb=4",
        "train.tokens_per_rank=2048" if packed else "train.micro_batch_size=4",
    )
    needed = fitted(*words, ranks=ranks).need.bytes
    named: set[str] = set()
    counts = set()
    for percent in (80, 40, 25):
        budget = f"train.memory_gb={needed * percent / 100 / GB}"
        fit = fitted(*words, budget, ranks=ranks)
        assert not fit.fits
        for advice in fit.advice:
            followed = applied(fitted, (*words, budget), advice, ranks)
            assert followed.fits, advice
            assert followed.need.bytes == advice.bytes
            named |= {change.split("=")[0].split()[0] for change in advice.changes}
            counts.add(len([change for change in advice.changes if not change.startswith("parallel")]))
        assert bool(fit.advice) != bool(fit.least)
    assert named >= {"train.recompute", "train.tokens_per_rank" if packed else "train.micro_batch_size"}
    assert max(counts) > 1, "nothing was ever combined"


def test_samples_are_cut_only_where_nothing_else_is_enough(make_config: Any, tmp_path: Path) -> None:
    config, _ = make_config(tmp_path / "run", "data.max_length=512", "train.loss_memory_mb=4")
    checked = check(config, Ranks())
    subject = _without_process(checked.subject(None))
    needed = subject.need(config, Ranks()).bytes
    cut = []
    for percent in range(90, 5, -4):
        train = config.train.model_copy(update={"memory_gb": needed * percent / 100 / GB})
        advice = fit_of(config.model_copy(update={"train": train}), Ranks(), subject).advice
        if advice:
            cut.append(any(change.startswith("data.max_length") for one in advice for change in one.changes))
            assert not cut[-1] or len(advice) == 1
    assert set(cut) == {False, True}
    assert cut == sorted(cut), "cut although less was enough before"


def test_a_target_that_is_most_of_it_is_split(fitted: Fitted) -> None:
    """Of a few tokens the target's weights are the most; only ranks that hold it together make it less."""
    words = ("data.max_length=16", "train.micro_batch_size=1", "train.loss_memory_mb=1", "target.dtype=bfloat16")
    fit = fitted(*words, ranks=2)
    weights = next(part.bytes for part in fit.need.parts if part.name == "target model")
    budget = f"train.memory_gb={(fit.need.bytes - weights / 4) / GB}"
    advice = fitted(*words, budget, ranks=2).advice
    assert ("target.tensor_parallel=2",) in [one.changes for one in advice]


def test_where_nothing_helps_the_plan_says_by_how_much(fitted: Fitted) -> None:
    fit = fitted("train.memory_gb=0.000001")
    assert not fit.fits
    assert not fit.advice
    assert fit.least is not None
    assert fit.least.bytes < fit.need.bytes
    (remedy,) = fit.remedies()
    assert remedy.startswith("no option makes it fit: the least, ")
    assert remedy.endswith("too much")


def test_known_lengths_count_and_not_the_longest_that_would_be_allowed(fitted: Fitted) -> None:
    allowed = fitted("data.max_length=512")
    known = fitted("data.max_length=512", lengths=Lengths(longest=40, mean=30.0))
    short = fitted("data.max_length=40")
    assert known.need.bytes == short.need.bytes < allowed.need.bytes


def test_a_given_budget_refuses_a_run_and_a_plan_shows_it(make_config: Any, tmp_path: Path) -> None:
    config, provenance = make_config(tmp_path / "run", "train.memory_gb=0.0001")
    with pytest.raises(ConfigError) as refused:
        inprocess.train(config, provenance=provenance)
    assert not (tmp_path / "run").exists()
    (problem,) = refused.value.problems
    assert problem.field == "train.memory_gb"
    assert "the run does not fit" in problem.message
    assert problem.remedy is not None
    assert "no option makes it fit" in problem.remedy
    text = make_plan(config, provenance).to_text()
    assert "does not fit" in text
    assert "- no option makes it fit" in text


def test_a_plan_of_more_than_the_machine_has_is_no_error_without_a_budget(make_config: Any, tmp_path: Path) -> None:
    """Ranks on one CPU share its memory."""
    config, provenance = make_config(tmp_path / "run")
    alone, crowded = (make_plan(config, provenance, Ranks(all=1, here=here)).memory for here in (1, 100_000))
    assert alone.available is not None
    assert crowded.available == alone.available // 100_000
    assert alone.fits
    assert not crowded.fits
    check(config, Ranks(all=1, here=100_000))
