"""Drafts handed over while they are trained, and writing with the newest of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchspec.core import registry
from torchspec.core.decoding.pushed import CURRENT, PushedDraft, push, return_to
from torchspec.core.decoding.writing import TextWriter
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import DraftSource, EngineOptions, TargetEngine, TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> TargetSpec:
    return read_target_spec(tiny_target)


@pytest.fixture(scope="module")
def head(tiny_target: Path) -> TargetHead:
    return load_target_head(tiny_target, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def engine(tiny_target: Path) -> TargetEngine:
    return registry.load_engine("hf", EngineOptions(target=tiny_target, device=registry.load_device("cpu")))


@pytest.fixture(scope="module")
def algorithm(target: TargetSpec) -> Algorithm:
    spec = registry.algorithms().spec("eagle3")
    return spec.create(spec.options(), target)


Pushes = Callable[[int], None]


@pytest.fixture
def pushes(algorithm: Algorithm, target: TargetSpec, head: TargetHead, tmp_path: Path) -> Pushes:
    """Another draft for every step."""

    def do(step: int) -> None:
        torch.manual_seed(step)
        draft = algorithm.build_draft(VocabularyMap.identity(target.vocab_size), head)
        push(tmp_path / "pushed", algorithm, draft.state_dict(), step)

    return do


@pytest.fixture
def follow(target: TargetSpec, head: TargetHead) -> Callable[[DraftSource], PushedDraft]:
    return lambda source: PushedDraft(source.directory, target, lambda: head, registry.load_device("cpu"), CPU)


def test_the_newest_is_read_once(pushes: Pushes, follow: Callable[[DraftSource], PushedDraft], tmp_path: Path) -> None:
    pushed = follow(DraftSource(directory=tmp_path / "pushed", length=2))
    assert pushed.drafter() is None
    pushes(4)
    first = pushed.drafter()
    assert first is not None
    assert pushed.drafter() is first
    pushes(8)
    second = pushed.drafter()
    assert second is not None
    assert second is not first


def test_older_ones_go(pushes: Pushes, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        pushes(step)
    assert {path.name for path in (tmp_path / "pushed").iterdir()} == {CURRENT, "step-4", "step-6"}
    assert (tmp_path / "pushed" / CURRENT).read_text() == "step-6"


def test_a_run_that_goes_on_returns_to_an_earlier_one(
    pushes: Pushes, follow: Callable[[DraftSource], PushedDraft], tmp_path: Path
) -> None:
    """Later ones are not found again, and one of the same name is another one."""
    directory = tmp_path / "pushed"
    return_to(directory, 0)  # nothing is there
    pushed = follow(DraftSource(directory=directory, length=2))
    for step in (4, 6):
        pushes(step)
    later = pushed.drafter()
    return_to(directory, 4)
    assert {path.name for path in directory.iterdir()} == {CURRENT, "step-4"}
    earlier = pushed.drafter()
    assert earlier is not None
    assert earlier is not later
    pushes(6)
    assert pushed.drafter() not in (later, earlier)
    return_to(directory, 2)
    assert list(directory.iterdir()) == []
    assert pushed.drafter() is None


def test_one_that_cannot_be_read_leaves_the_one_before(
    pushes: Pushes,
    follow: Callable[[DraftSource], PushedDraft],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pushed = follow(DraftSource(directory=tmp_path / "pushed", length=2))
    pushes(1)
    before = pushed.drafter()
    pushes(2)
    shutil.rmtree(tmp_path / "pushed" / "step-2")
    assert pushed.drafter() is before
    assert "going on with the draft before step-2" in caplog.text


def test_reading_one_leaves_the_random_state(
    pushes: Pushes, follow: Callable[[DraftSource], PushedDraft], tmp_path: Path
) -> None:
    pushes(1)
    state = torch.get_rng_state()
    assert follow(DraftSource(directory=tmp_path / "pushed", length=2)).drafter() is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_text_is_the_targets_with_a_draft_and_without(
    engine: TargetEngine, pushes: Pushes, follow: Callable[[DraftSource], PushedDraft], tmp_path: Path
) -> None:
    source = DraftSource(directory=tmp_path / "pushed", length=3)
    writer = TextWriter(engine, follow)
    alone = writer.write(PROMPTS, max_new_tokens=10)
    before = writer.write(PROMPTS, max_new_tokens=10, source=source)
    assert before == alone
    assert [text.rounds for text in alone] == [None, None]
    pushes(1)
    drafted = writer.write(PROMPTS, max_new_tokens=10, source=source)
    assert [text.tokens for text in drafted] == [text.tokens for text in alone]
    for text in drafted:
        assert text.accepted is not None
        assert text.rounds == len(text.accepted)
        assert text.accepted_tokens == sum(text.accepted)
        assert len(text.tokens) <= 1 + text.rounds + text.accepted_tokens


def test_batches_draw_independently(
    engine: TargetEngine, pushes: Pushes, follow: Callable[[DraftSource], PushedDraft], tmp_path: Path
) -> None:
    pushes(1)
    source = DraftSource(directory=tmp_path / "pushed", length=2)
    writer = TextWriter(engine, follow)

    def drawn(prompt: list[int], seed: int) -> tuple[int, ...]:
        (text,) = writer.write([prompt], max_new_tokens=12, temperature=5.0, seed=seed, source=source)
        return text.tokens

    assert drawn(PROMPTS[0], 1) == drawn(PROMPTS[0], 1)
    assert len({drawn(PROMPTS[0], 1), drawn(PROMPTS[0], 2), drawn(PROMPTS[1], 1)}) == 3
