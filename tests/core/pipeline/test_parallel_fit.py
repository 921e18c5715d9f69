"""Everything that can be wrong with how ranks share is found, and whatever the problem offers instead works."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from torchspec.core import registry
from torchspec.core.errors import ConfigError, Problem, TargetError
from torchspec.core.interfaces.engine import EngineSpec, TargetSpec
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.engine_setup import create_algorithm
from torchspec.core.pipeline.parallel_fit import (
    choose_exchange,
    choose_logits,
    logits_ranks,
    parallel_problems,
    row_tokens,
)
from torchspec.core.pipeline.preflight import check


@dataclass(frozen=True)
class Wrong:
    """One mistake: `words` with so many ranks; the settings to blame, and what is said."""

    ranks: int
    words: tuple[str, ...]
    fields: tuple[str, ...]
    says: str


WRONG = {
    "ranks cannot be divided": Wrong(6, ("parallel.ulysses=4",), ("parallel",), "6 rank.* cannot be divided"),
    "neither into two by two": Wrong(
        6, ("parallel.ulysses=2", "parallel.ring=2"), ("parallel",), "ulysses=2 x parallel.ring=2"
    ),
    "one rank": Wrong(1, ("parallel.ring=3",), ("parallel",), "1 rank.* cannot be divided"),
    "a prime": Wrong(5, ("parallel.ulysses=2", "parallel.ring=3"), ("parallel",), "5 rank"),
    "rows shorter than samples": Wrong(
        2, ("parallel.ring=2", "train.tokens_per_rank=100", "data.max_length=301"), ("train.tokens_per_rank",),
        "a row holds 200 tokens over 2 rank",
    ),
    "packed, and so many samples": Wrong(
        1, ("train.tokens_per_rank=512", "data.max_length=512", "train.micro_batch_size=2"),
        ("train.micro_batch_size",), "one packed row",
    ),
    "heads that three cannot share": Wrong(
        12, ("parallel.ulysses=3", "parallel.exchange=usp"), ("parallel.ulysses",), "4 query and 2 key heads"
    ),
    "heads that three of six cannot share": Wrong(
        6, ("parallel.ulysses=3", "parallel.exchange=usp"), ("parallel.ulysses",), "4 query and 2 key heads"
    ),
    "an exchange without sharing": Wrong(
        2, ("parallel.exchange=ring",), ("parallel.exchange",), "no ranks share a sequence"
    ),
    "heads that eight cannot share": Wrong(
        8, ("parallel.ulysses=8", "parallel.exchange=ulysses"), ("parallel.ulysses",), "4 query and 2 key heads"
    ),
    "ulysses of a ring": Wrong(
        4, ("parallel.ulysses=2", "parallel.ring=2", "parallel.exchange=ulysses"), ("parallel.exchange",),
        "is for parallel.ring=1, not 2",
    ),
    "a ring of ulysses": Wrong(
        4, ("parallel.ulysses=2", "parallel.ring=2", "parallel.exchange=ring"), ("parallel.exchange",),
        "is for parallel.ulysses=1, not 2",
    ),
    "a ring without one": Wrong(
        3, ("parallel.ulysses=3", "parallel.exchange=ring"), ("parallel.exchange",), "is for parallel.ulysses=1, not 3"
    ),
    "a target over too many": Wrong(2, ("target.tensor_parallel=4",), ("target.tensor_parallel",), "divide the 2 rank"),
    "a target over a part of a sequence": Wrong(
        4, ("target.tensor_parallel=2", "parallel.ring=4"), ("target.tensor_parallel",), "whole groups of 4"
    ),
    "a target over more than its heads": Wrong(
        12, ("target.tensor_parallel=3",), ("target.tensor_parallel",), "divide the target's heads"
    ),
    "nobody to share a head with": Wrong(
        1, ("target.shard_logits=vocabulary",), ("target.shard_logits",), "nobody to share the target's head with"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> TargetSpec:
    return read_target_spec(tiny_target)


@pytest.fixture(scope="module")
def hf() -> EngineSpec:
    return registry.backends().spec("hf")


Base = dict[str, Any]


def base(words: tuple[str, ...]) -> Base:
    """Settings of the fixture's without those that a packed run must leave out."""
    packed = any("tokens_per_rank" in word for word in words)
    return {"train": {"batch_size": 4} if packed else {"batch_size": 4, "micro_batch_size": 2}}


def problems(make_config: Any, target: TargetSpec, backend: EngineSpec, ranks: int, *words: str) -> list[Problem]:
    config, _ = make_config(Path("never-written"), *words, **base(words))
    return parallel_problems(config, ranks, algorithm=create_algorithm(config, target), backend=backend, target=target)


def offers(problem: Problem, words: tuple[str, ...], ranks: int) -> list[tuple[tuple[str, ...], int]]:
    """The words and ranks of every way out that the problem names."""
    found = [((*words, f"{problem.field}={choice}"), ranks) for choice in problem.choices]
    for setting in re.findall(r"[a-z]+\.[a-z_]+=\w+", problem.remedy):
        found.append(((*words, setting), ranks))
    for ulysses, ring in re.findall(r"(\d+) x (\d+)", problem.remedy):
        found.append(((*words, f"parallel.ulysses={ulysses}", f"parallel.ring={ring}"), ranks))
    for count in re.findall(r"start (\d+) ranks", problem.remedy):
        found += [(words, int(count)), (words, 3 * int(count))]
    for least in re.findall(r"give (\d+) or more", problem.remedy):
        found += [((*words, f"{problem.field}={int(least) + more}"), ranks) for more in (0, 1)]
    if "leave one of the two out" in problem.remedy:
        found += [
            (tuple(word for word in words if not word.startswith(f"train.{name}=")), ranks)
            for name in ("tokens_per_rank", "micro_batch_size")
        ]
    return found


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_found_and_every_way_out_that_it_names_is_one(
    make_config: Any, target: TargetSpec, hf: EngineSpec, name: str
) -> None:
    wrong = WRONG[name]
    found = problems(make_config, target, hf, wrong.ranks, *wrong.words)
    assert tuple(problem.field for problem in found) == wrong.fields
    assert re.search(wrong.says, str(found[0]))
    ways = offers(found[0], wrong.words, wrong.ranks)
    assert ways, str(found[0])
    for words, ranks in ways:
        assert problems(make_config, target, hf, ranks, *words) == [], words


def test_one_less_than_what_is_offered_does_not_work(make_config: Any, target: TargetSpec, hf: EngineSpec) -> None:
    words = ("parallel.ring=2", "data.max_length=301")
    assert problems(make_config, target, hf, 2, *words, "train.tokens_per_rank=151") == []
    [short] = problems(make_config, target, hf, 2, *words, "train.tokens_per_rank=150")
    assert "give 151 or more" in short.remedy


def test_every_shape_that_divides_is_offered_and_no_other(make_config: Any, target: TargetSpec, hf: EngineSpec) -> None:
    [problem] = problems(make_config, target, hf, 6, "parallel.ulysses=4")
    offered = {(int(u), int(r)) for u, r in re.findall(r"(\d+) x (\d+)", problem.remedy)}
    assert offered == {(u, r) for u in range(1, 7) for r in range(1, 7) if u * r > 1 and 6 % (u * r) == 0}
    assert "start" not in problem.remedy or "; or start 4 ranks" in problem.remedy


def test_a_target_that_cannot_be_split_or_divided(make_config: Any, target: TargetSpec, hf: EngineSpec) -> None:
    """By its engine, by its architecture, by its vocabulary."""
    words = ("target.tensor_parallel=2",)
    alone = replace(hf, name="alone", tensor_parallel_sizes=None)
    [problem] = problems(make_config, target, alone, 2, *words)
    assert (problem.field, problem.value) == ("target.tensor_parallel", 2)
    assert "backend alone does not hold a target" in str(problem)
    assert "leave it at 1, or use a backend that does, such as hf" in problem.remedy
    assert problems(make_config, target, alone, 2, "target.tensor_parallel=1") == []
    assert problems(make_config, target, hf, 2, *words) == []

    def refuse(spec: TargetSpec) -> tuple[int, ...]:
        raise TargetError("its layers have a part that no rank may have alone")

    [problem] = problems(make_config, target, replace(hf, tensor_parallel_sizes=refuse), 2, *words)
    assert (problem.field, problem.message) == (
        "target.tensor_parallel", "its layers have a part that no rank may have alone",
    )  # fmt: skip

    small = replace(target, vocab_size=3)
    config, _ = make_config(Path("never-written"), "target.shard_logits=tokens")
    [problem] = parallel_problems(config, 4, target=small)
    assert (problem.field, problem.message) == ("target.shard_logits", "4 ranks cannot share a vocabulary of 3")
    assert parallel_problems(config, 3, target=small) == []


def test_what_is_not_known_yet_is_not_judged(make_config: Any) -> None:
    words = ("parallel.ulysses=3", "parallel.exchange=usp", "target.tensor_parallel=3", "target.shard_logits=tokens")
    config, _ = make_config(Path("never-written"), *words)
    assert parallel_problems(config, 3) == []


def test_everything_that_is_wrong_is_said_at_once(make_config: Any, tmp_path: Path) -> None:
    words = (
        "parallel.ulysses=3", "parallel.exchange=usp", "train.tokens_per_rank=10", "train.micro_batch_size=2",
        "target.tensor_parallel=2", "target.shard_logits=vocabulary", "data.max_length=512", "train.offload=all",
    )  # fmt: skip
    config, _ = make_config(tmp_path / "run", *words)
    with pytest.raises(ConfigError) as caught:
        check(config, Ranks(all=4, here=4))
    assert {problem.field for problem in caught.value.problems} == {
        "parallel", "parallel.ulysses", "train.tokens_per_rank", "train.micro_batch_size", "target.tensor_parallel",
        "train.offload",
    }  # fmt: skip
    assert len(caught.value.problems) == 6


def exchange(make_config: Any, target: TargetSpec, ranks: int, *words: str) -> tuple[str, str]:
    config, _ = make_config(Path("never-written"), *words)
    return choose_exchange(config, create_algorithm(config, target), ranks)


def test_the_exchange_is_what_is_asked_for_or_chosen_by_bytes(make_config: Any, target: TargetSpec) -> None:
    assert exchange(make_config, target, 4) == ("gather", "")
    for asked in ("gather", "usp"):
        shared = ("parallel.ulysses=2", "parallel.ring=2", f"parallel.exchange={asked}")
        assert exchange(make_config, target, 4, *shared) == (asked, "")
    chosen, why = exchange(make_config, target, 2, "parallel.ulysses=2")
    for name in ("gather", "ulysses", "usp"):
        assert name == chosen or f"{name} " in why
    assert re.search(r"a rank sends [\d.]+ MB per micro-batch .*and holds [\d.]+ MB of keys and values", why)
    # Three ranks cannot share four heads: nothing but gathering is left.
    chosen, why = exchange(make_config, target, 3, "parallel.ulysses=3")
    assert (chosen, "against" in why) == ("gather", False)


def test_how_large_the_exchange_takes_a_forward_pass_to_be(make_config: Any) -> None:
    """Rows as padded as they may be, or packed; the share of one rank, and no more samples than there are."""

    def rows(ranks: int, *words: str, longest: int | None = None) -> int:
        config, _ = make_config(Path("never-written"), *words)
        return row_tokens(config, ranks, longest)

    long = "data.max_length=301"
    assert rows(2, "parallel.ring=2", long) == 2 * 151
    assert rows(2, "parallel.ring=2", long, longest=100) == 2 * 50
    assert rows(4, "train.batch_size=4", "train.micro_batch_size=8", long) == 301
    assert rows(4, "parallel.ulysses=2", "train.batch_size=4", "train.micro_batch_size=8", long) == 2 * 151
    packed = ("parallel.ring=2", "train.batch_size=4", long)
    assert rows(2, *packed, "train.tokens_per_rank=177", longest=100) == 177
    assert rows(2, *packed, "train.tokens_per_rank=777", longest=100) == 4 * 50


@pytest.mark.parametrize(
    ("words", "ranks", "form", "width"),
    [
        ((), 4, "off", 4),
        (("parallel.ring=2",), 4, "off", 2),
        (("target.tensor_parallel=2",), 4, "tokens", 2),
        (("target.tensor_parallel=4", "parallel.ring=2"), 4, "tokens", 4),
        (("target.tensor_parallel=2", "target.shard_logits=vocabulary"), 4, "vocabulary", 2),
        (("target.shard_logits=vocabulary", "parallel.ulysses=2"), 4, "vocabulary", 2),
        (("target.tensor_parallel=2", "target.shard_logits=off"), 4, "off", 2),
        (("target.shard_logits=tokens",), 4, "tokens", 4),
    ],
)
def test_a_head_is_spread_where_asked_or_where_the_target_is(
    make_config: Any, words: tuple[str, ...], ranks: int, form: str, width: int
) -> None:
    config, _ = make_config(Path("never-written"), *words)
    chosen, why = choose_logits(config)
    assert (chosen, logits_ranks(config, ranks)) == (form, width)
    asked = config.target.shard_logits != "auto"
    assert bool(why) == (not asked and config.target.tensor_parallel > 1)
    if why:
        assert f"{config.target.tensor_parallel} ranks hold the target together" in why
