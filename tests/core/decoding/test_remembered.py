"""Remembered answers stand in for the target's own, and only where they are exactly those."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchspec.core.decoding.remembered import RememberingWriter, digest_of, read_answers, write_answers

PAIRS = [([1, 2, 3], [7, 8, 2]), ([1, 23], [9])]


class Engine:
    """Answers 100 to everything, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def describe(self) -> Any:
        return SimpleNamespace(path=Path("somewhere"))

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
        self.asked.append((list(map(tuple, prompts)), settings))
        return [[100] for _ in prompts]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(bytes(5000))
    return tmp_path


def test_answers_come_back_for_their_target_alone(target: Path) -> None:
    path = target / "answers.jsonl.xz"
    assert write_answers(path, target, 16, PAIRS) == 2
    assert read_answers(path, target, 16) == {digest_of(prompt): answer for prompt, answer in PAIRS}
    assert read_answers(path, target, 17) == {}, "an answer may have been cut at 16"
    (target / "model.safetensors").write_bytes(bytes(4999) + b"x")
    assert read_answers(path, target, 16) == {}, "another target's"
    assert read_answers(target / "missing", target, 16) == {}


def test_a_prompt_is_told_from_its_neighbours() -> None:
    assert len({digest_of(prompt) for prompt in ([1, 23], [12, 3], [1, 2, 3], [123])}) == 4


def test_the_rest_is_written_by_the_engine_in_its_place() -> None:
    engine = Engine()
    writer = RememberingWriter(engine, {digest_of(prompt): answer for prompt, answer in PAIRS})
    assert writer.generate([[5], [1, 2, 3], [6], [1, 23]], max_new_tokens=2) == [[100], [7, 8], [100], [9]]
    assert engine.asked == [([(5,), (6,)], {"max_new_tokens": 2, "temperature": 0.0, "seed": 0})]
    assert writer.generate([[1, 23]], max_new_tokens=2) == [[9]]
    assert len(engine.asked) == 1, "nothing was left to write"


def test_sampled_text_is_never_remembered() -> None:
    engine = Engine()
    writer = RememberingWriter(engine, {digest_of(prompt): answer for prompt, answer in PAIRS})
    assert writer.generate([[1, 23]], max_new_tokens=4, temperature=0.5, seed=3) == [[100]]
    assert engine.asked[0][1] == {"max_new_tokens": 4, "temperature": 0.5, "seed": 3}
