"""Answers written while the draft is trained: what becomes of prompts, in which groups, and how far ahead."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspec.core.errors import LostOnTextError, TargetError
from torchspec.core.interfaces.engine import DraftSource, ServedText
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.capturing import Documents
from torchspec.core.training.plan import Cut, Plan, Shares, Turn
from torchspec.core.training.source import WrittenAhead
from torchspec.core.training.window import WrittenCounts
from torchspec.core.training.written import (
    Writing,
    answered,
    groups_of,
    texts_from_json,
    texts_to_json,
    write_texts,
)

WRITING = Writing(max_new_tokens=4, max_length=16, context=18)
LENGTHS = (5, 9, 3, 12, 7, 8, 4, 11)
STEPS = 4


class Echo:
    """Writes the prompt's last token and those after it; refuses prompts that hold one of `refused`. `gates`: a call
    waits until its first prompt's sample is let go."""

    def __init__(self, refused: Sequence[int] = (), gates: dict[int, threading.Event] | None = None) -> None:
        self.refused, self.gates = set(refused), gates or {}
        self.calls: list[tuple[list[list[int]], int, int]] = []
        self.changed = threading.Condition()

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        source: DraftSource | None = None,
    ) -> list[ServedText]:
        with self.changed:
            self.calls.append(([list(prompt) for prompt in prompts], max_new_tokens, seed))
            self.changed.notify_all()
        gate = self.gates.get(prompts[0][0] // 1000)
        assert gate is None or gate.wait(20), "the test let it go too late"
        if self.refused & {token for prompt in prompts for token in prompt}:
            raise LostOnTextError("it will not")
        return [
            ServedText(tokens=tuple(prompt[-1] + step for step in range(max_new_tokens)), rounds=2, accepted_tokens=1)
            for prompt in prompts
        ]

    def asked(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.calls) >= count, timeout=5), self.calls


def documents(made_up: ModuleType, *lengths: int) -> Documents:
    samples = [made_up.sample(number, length) for number, length in enumerate(lengths)]
    return Documents(indices=tuple(range(len(lengths))), samples=samples, packs=((0,),))


# One forward pass.


def test_an_answer_is_supervised_and_nothing_else(made_up: ModuleType) -> None:
    prompts = documents(made_up, 3, 5)
    made = answered(prompts, write_texts(Echo(), dict(enumerate(prompts.samples)), WRITING, step=0))
    assert [sample.input_ids_T.tolist() for sample in made.samples] == [
        [1, 2, 3, 3, 4, 5, 6], [1001, 1002, 1003, 1004, 1005, 1005, 1006, 1007, 1008],
    ]  # fmt: skip
    assert [sample.loss_mask_T.int().tolist() for sample in made.samples] == [[0] * 3 + [1] * 4, [0] * 5 + [1] * 4]
    assert [sample.sample_id for sample in made.samples] == ["row-0", "row-1"]
    assert made.unwritten == {}


def test_prompts_near_the_end_of_the_context_go_alone(made_up: ModuleType) -> None:
    """The others are asked for together, and what a sample has no room for is cut."""
    prompts = dict(enumerate(documents(made_up, 3, 14, 12, 15).samples))
    author = Echo()
    texts = write_texts(author, prompts, WRITING, step=0)
    assert [([len(prompt) for prompt in asked], room) for asked, room, _ in author.calls] == [
        ([3, 14, 12], 4),
        ([15], 1),
    ]
    assert {number: len(text.tokens) for number, text in texts.items() if isinstance(text, ServedText)} == {
        0: 4, 1: 2, 2: 4, 3: 1,
    }  # fmt: skip


def test_no_more_is_asked_for_than_the_roomiest_has_room_for(made_up: ModuleType) -> None:
    author = Echo()
    texts = write_texts(author, dict(enumerate(documents(made_up, 14, 15).samples)), WRITING, step=0)
    assert [room for _, room, _ in author.calls] == [2]
    assert [len(text.tokens) for text in texts.values() if isinstance(text, ServedText)] == [2, 1]


def test_an_author_that_fails_otherwise_ends_the_run(made_up: ModuleType) -> None:
    """Nor is a text without a token one."""

    class Refuses(Echo):
        def write(self, prompts: Sequence[Sequence[int]], **_: object) -> list[ServedText]:
            raise TargetError("was not ready within 600 s")

    class Silent(Echo):
        def write(self, prompts: Sequence[Sequence[int]], **_: object) -> list[ServedText]:
            return [ServedText(tokens=()) for _ in prompts]

    prompts = dict(enumerate(documents(made_up, 3, 5).samples))
    with pytest.raises(TargetError, match="not ready"):
        write_texts(Refuses(), prompts, WRITING, step=0)
    assert write_texts(Silent(), prompts, WRITING, step=0) == dict.fromkeys(prompts, "nothing was written")


def test_every_step_draws_anew(made_up: ModuleType) -> None:
    prompts = {0: made_up.sample(0, 3)}
    author = Echo()
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        write_texts(author, prompts, Writing(max_new_tokens=4, max_length=16, context=18, seed=seed), step)
    assert len({seed for _, _, seed in author.calls}) == 3
    assert all(0 <= seed < 2**31 for _, _, seed in author.calls)


def test_a_prompt_that_fails_takes_no_other_with_it(made_up: ModuleType) -> None:
    prompts = documents(made_up, 3, 5, 4)
    made = answered(prompts, write_texts(Echo(refused=[1002]), dict(enumerate(prompts.samples)), WRITING, step=0))
    assert made.unwritten == {1: "it will not"}
    assert [int(sample.loss_mask_T.sum()) for sample in made.samples] == [4, 0, 4]
    assert made.samples[1].input_ids_T.numel() == 5
    counts = WrittenCounts()
    counts.add(made.texts)
    assert counts == WrittenCounts(texts=2, tokens=8, rounds=4, accepted=2)
    assert counts.to_json() == {"texts": 2, "tokens": 8, "acceptance_length": 1.5}


def test_they_are_written_for_in_the_groups_in_which_they_are_captured(made_up: ModuleType) -> None:
    prompts = documents(made_up, 3, 9, 5, 4)
    assert groups_of(prompts, 1) == [[0, 1, 2, 3]]
    assert groups_of(prompts, 2) == [[0, 1], [2, 3]]
    stand_in = Documents(indices=(), samples=[made_up.sample(0, 3)], packs=((0,),))
    assert groups_of(stand_in, 2) == [[], []]


def test_texts_travel_as_json() -> None:
    texts = {0: ServedText(tokens=(1, 2), rounds=3, accepted_tokens=4), 2: "why", 1: ServedText(tokens=(5,))}
    assert texts_from_json(texts_to_json(texts)) == texts


# Ahead of the computing.


class Run:
    """Two samples a step, which wait until they are let go."""

    def __init__(
        self, made_up: ModuleType, context: ParallelContext, tokens_ahead: int, patience: float = 20.0
    ) -> None:
        self.samples = made_up.Ragged(LENGTHS)
        self.plan = Plan(LENGTHS, Cut(micro_batch_size=2), Shares(), batch_size=2, bucket_size=2, seed=0)
        self.gates = {number: threading.Event() for number in range(len(LENGTHS))}
        self.author = Echo(gates=self.gates)
        self.source = WrittenAhead(
            [self.author], WRITING, context, tokens_ahead=tokens_ahead, patience=patience, calls=2
        )  # fmt: skip

    def start(self, step: int = 0) -> None:
        self.source.start(self.plan, self.samples, 0, step, STEPS)

    def open(self, *steps: int) -> None:
        for step in steps:
            for sample in self.plan.batch(step):
                self.gates[sample].set()

    def popped(self) -> tuple[Turn, Documents] | None:
        """When it has had the time to be there."""
        until = time.monotonic() + 5
        while (found := self.source.pop()) is None and time.monotonic() < until:
            time.sleep(0.005)
        return found


@pytest.fixture
def make_run(made_up: ModuleType, context: ParallelContext) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(tokens_ahead: int, **settings: float) -> Run:
        made.append(Run(made_up, context, tokens_ahead, **settings))
        return made[-1]

    yield make
    for run in made:
        run.open(*range(STEPS))
        run.source.close()


def test_turns_come_in_order_when_they_are_written(make_run: Callable[..., Run]) -> None:
    run = make_run(10**6)
    run.start()
    run.author.asked(2)
    assert run.source.pop() is None
    run.open(1)
    assert run.source.pop() is None, "the second before the first"
    run.open(0)
    for step in (0, 1):
        found = run.popped()
        assert found is not None
        assert found[0].step == step
        assert list(found[1].indices) == run.plan.batch(step)
        lengths = [sample.input_ids_T.numel() for sample in found[1].samples]
        assert lengths == [LENGTHS[index] + 4 for index in found[1].indices]
    assert run.source.pop() is None


def test_no_more_is_begun_than_may_be_ahead(make_run: Callable[..., Run]) -> None:
    """Two turns at least, which keep the author busy; another one when the first has been used."""
    run = make_run(1)
    run.open(*range(STEPS))
    run.start()
    run.author.asked(2)
    for used in range(STEPS):
        run.source.refresh()
        found = run.popped()
        assert found is not None
        assert found[0].step == used
        time.sleep(0.05)
        assert len(run.author.calls) == min(used + 2, STEPS)
    assert run.source.pop() is None


def test_what_is_used_now_is_waited_for(make_run: Callable[..., Run]) -> None:
    run = make_run(10**6)
    run.start(step=2)
    threading.Timer(0.2, lambda: run.open(2)).start()
    run.source.refresh()
    found = run.source.pop()
    assert found is not None
    assert found[0].step == 2


def test_not_for_ever(make_run: Callable[..., Run]) -> None:
    run = make_run(10**6, patience=0.2)
    run.start()
    with pytest.raises(TargetError, match=r"the texts of step 1 did not come within \d+ s: the logs of the engines"):
        run.source.refresh()


def test_supervised_tokens_are_what_the_target_wrote(make_run: Callable[..., Run]) -> None:
    run = make_run(10**6)
    run.open(*range(STEPS))
    run.start()
    found = run.popped()
    assert found is not None
    for sample in found[1].samples:
        prompt = sample.input_ids_T[~sample.loss_mask_T]
        assert torch.equal(sample.input_ids_T[sample.loss_mask_T], prompt[-1] + torch.arange(4))


class Pair:
    """Two ranks that share sequences, one after the other: what the first has told is there for the second."""

    data_rank, data_size, sequence_size = 0, 1, 2

    def __init__(self, sequence_rank: int, told: list[Any]) -> None:
        self.sequence_rank, self.told = sequence_rank, told

    def gather(self, value: Any) -> list[Any]:
        if self.sequence_rank == 0:
            self.told[:] = json.loads(json.dumps([value]))
        return [*self.told, []]


def test_the_others_are_told_each_text_once(made_up: ModuleType) -> None:
    """Although the first rank may have asked for the features of fewer turns than were written for."""
    samples = made_up.Ragged(LENGTHS)
    plan = Plan(LENGTHS, Cut(micro_batch_size=2), Shares(), batch_size=2, bucket_size=2, seed=0)
    told: list[Any] = []
    first, second = (
        WrittenAhead([Echo()], WRITING, Pair(rank, told), tokens_ahead=10**6, patience=20.0, calls=2)  # type: ignore[arg-type]
        for rank in (0, 1)
    )
    for source in (first, second):
        source.start(plan, samples, 0, 0, STEPS)
    for step in range(STEPS):
        time.sleep(0.05)  # all of them are written, and one turn is taken
        first.refresh()
        second.refresh()
        mine, theirs = first.pop(), second.pop()
        assert mine is not None
        assert theirs is not None
        assert mine[0].step == theirs[0].step == step
        for a, b in zip(mine[1].samples, theirs[1].samples, strict=True):
            assert torch.equal(a.input_ids_T, b.input_ids_T)
            assert torch.equal(a.loss_mask_T, b.loss_mask_T)
    assert first.pop() is second.pop() is None
    first.close()
    second.close()
