"""A feed that asks ahead of time: in the order of use, within its budget, beside the computing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspec.core.errors import TargetError
from torchspec.core.interfaces.engine import CaptureRequest
from torchspec.core.interfaces.features import Captured, Features, FeatureSink, Quarantined
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training import ahead, patience
from torchspec.core.training.capturing import Documents
from torchspec.core.training.feed import Flow
from torchspec.core.training.plan import Cut, Plan, Shares, Turn
from torchspec.core.training.streaming import CALLS_PER_ENGINE, StreamingFeed

LENGTHS = (5, 9, 3, 12, 7, 8, 4, 11, 6, 10, 2, 13)
STEPS = 6
PLENTY = 10**9
TOKEN_BYTES = 3 * 2 * 8  # two taps and the last states of size 2, in float64


class Gated:
    """An engine whose calls for a step wait until the step is let go. `begun` and `done` are steps, in order."""

    def __init__(self, inner: Any, plan: Plan) -> None:
        self.inner = inner
        self.step_of = {sample: step for step in range(STEPS) for sample in plan.batch(step)}
        self.gates = [threading.Event() for _ in range(STEPS)]
        self.begun: list[int] = []
        self.done: list[int] = []
        self.errors: dict[int, Exception] = {}
        self.changed = threading.Condition()

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        (step,) = {self.step_of[request.input_ids[0] // 1000] for request in batch}
        self._tell(self.begun, step)
        assert self.gates[step].wait(20), "the test let it go too late"
        if step in self.errors:
            raise self.errors[step]
        found: list[Captured] = self.inner.capture(batch, taps, sink)
        self._tell(self.done, step)
        return found

    def _tell(self, steps: list[int], step: int) -> None:
        with self.changed:
            steps.append(step)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=5), (self.begun, self.done)

    def close(self) -> None:
        return None


class Run:
    """A feed of this process alone over one epoch of two samples a step; everything waits at first."""

    def __init__(self, made_up: ModuleType, context: ParallelContext, **settings: Any) -> None:
        self.made_up, self.context = made_up, context
        self.samples = made_up.Ragged(LENGTHS)
        self.plan = Plan(
            LENGTHS, Cut(micro_batch_size=2), Shares(), batch_size=2, bucket_size=2, seed=0
        )  # fmt: skip
        self.inner = made_up.Engine(settings.pop("refused", ()))
        self.engine = Gated(self.inner, self.plan)
        settings = {"name": "run", "budget": PLENTY, "patience": 30.0, **settings}
        self.feed = StreamingFeed(made_up.model(3), context, [self.engine], **settings)  # type: ignore[list-item]

    def start(self, step: int = 0, stop: int = STEPS) -> None:
        self.feed.start(self.plan, self.samples, step, stop)

    def open(self, *steps: int) -> None:
        for step in steps or range(STEPS):
            self.engine.gates[step].set()

    def turn(self, step: int) -> tuple[Turn, dict[int, Documents]]:
        (turn,) = self.plan.turns(step)
        return turn, {0: Documents.of(turn.micro_batches[0], self.samples, turn.some)}

    def rows(self, step: int) -> tuple[Any, dict[int, str]]:
        return self.feed.rows(*self.turn(step))

    def check(self, step: int, missing: Sequence[int] = ()) -> dict[int, str]:
        """The rows that come are the step's, looked up; -> the holes."""
        rows, holes = self.rows(step)
        documents = self.turn(step)[1][0]
        self.made_up.check_alone(self.made_up.tensors(rows), documents, missing)
        return holes

    def nbytes(self, step: int) -> int:
        return sum(LENGTHS[sample] for sample in self.plan.batch(step)) * TOKEN_BYTES

    def ahead(self, used: int, budget: int) -> int:
        """Which step is the first that is not asked for when so many have been used."""
        reached = min(used + 1, STEPS)
        while reached < STEPS and sum(map(self.nbytes, range(used, reached + 1))) <= budget:
            reached += 1
        return reached


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(made_up: ModuleType, context: ParallelContext) -> Iterator[MakeRun]:
    made: list[Run] = []

    def make(**settings: Any) -> Run:
        made.append(Run(made_up, context, **settings))
        return made[-1]

    yield make
    for run in made:
        run.open()
        run.feed.close()


def test_features_come_in_the_order_of_use_however_they_are_made(make_run: MakeRun) -> None:
    run = make_run()
    run.start()
    together = list(range(CALLS_PER_ENGINE))
    run.engine.wait(lambda: sorted(run.engine.begun) == together)
    for step in reversed(together):
        run.open(step)
        run.engine.wait(lambda step=step: step in run.engine.done)  # type: ignore[misc]
    run.open()
    for step in range(STEPS):
        assert run.check(step) == {}
    assert sorted(run.engine.done) == list(range(STEPS)), "each is made once"


def test_a_run_that_goes_on_asks_for_what_is_left(make_run: MakeRun) -> None:
    run = make_run()
    run.open()
    run.start(2, 5)
    for step in (2, 3, 4):
        run.check(step)
    assert sorted(run.engine.begun) == [2, 3, 4]


def test_a_turn_out_of_order_is_a_mistake(make_run: MakeRun) -> None:
    run = make_run()
    run.open()
    run.start()
    with pytest.raises(AssertionError, match="in order"):
        run.rows(1)


def flow(run: Any) -> Flow:
    found = run.feed.flow()
    assert isinstance(found, Flow)
    return found


@pytest.mark.parametrize("budget", [1, 600, 1500, 2200, PLENTY])
def test_no_more_is_asked_for_than_the_budget_allows_but_one_turn(make_run: MakeRun, budget: int) -> None:
    """Whether it has come or not."""
    run = make_run(budget=budget)
    run.start()
    assert flow(run).turns_ahead == run.ahead(0, budget)
    run.open()
    for step in range(STEPS):
        run.engine.wait(lambda step=step: len(run.engine.begun) == run.ahead(step, budget))  # type: ignore[misc]
        held = [run.nbytes(each) for each in range(step, run.ahead(step, budget))]
        assert flow(run).held_bytes == sum(held)
        assert sum(held) <= budget or len(held) == 1
        run.check(step)
    assert flow(run).turns_ahead == 0


@pytest.mark.parametrize("budget", [1, PLENTY])
def test_the_next_steps_are_made_while_one_is_computed(make_run: MakeRun, budget: int) -> None:
    """The first already while the trainer gets ready; and one that is not made yet holds up none before it."""
    run = make_run(budget=budget)
    run.open(0)
    run.start()
    run.engine.wait(lambda: 0 in run.engine.done)
    for step in range(STEPS - 1):
        run.check(step)
        run.engine.wait(lambda step=step: step + 1 in run.engine.begun)  # type: ignore[misc]
        run.open(step + 1)
        run.engine.wait(lambda step=step: step + 1 in run.engine.done)  # type: ignore[misc]
    run.check(STEPS - 1)


@pytest.mark.parametrize("error", [TargetError("out of memory"), TimeoutError("its own")])
def test_an_error_of_the_engine_is_raised_where_its_features_are_used(make_run: MakeRun, error: Exception) -> None:
    run = make_run()
    run.engine.errors[1] = error
    run.open()
    run.start()
    run.check(0)
    started = time.monotonic()
    with pytest.raises(type(error), match=str(error)):
        run.rows(1)
    assert time.monotonic() - started < 5


def test_no_more_is_asked_for_than_keeps_engines_busy(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_TURNS", 2)
    run = make_run()
    run.open()
    run.start()
    for used in range(STEPS):
        flow = run.feed.flow()
        assert flow is not None
        assert flow.turns_ahead == min(2, STEPS - used)
        run.rows(used)


def test_an_engine_that_never_answers_is_waited_for_with_patience(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_WORD", 0.05)
    monkeypatch.setattr(patience, "BETWEEN_WORDS", 0.05)
    run = make_run(patience=0.12)
    run.start()
    with pytest.raises(TargetError, match=r"features of step 1 did not come within 0 s"):
        run.rows(0)


def test_a_hole_comes_through_with_its_reason(make_run: MakeRun) -> None:
    """In its place among the documents, and the others of its turn are whole."""
    run = make_run(refused=[4, 7])
    run.open()
    run.start()
    found: dict[int, str] = {}
    for step in range(STEPS):
        holes = run.check(step, missing=[4, 7])
        found |= {run.plan.turns(step)[0].micro_batches[0].samples[n]: reason for n, reason in holes.items()}
    assert found == {4: "sample 4 is refused", 7: "sample 7 is refused"}


def test_closing_waits_for_nothing_and_asks_for_nothing_more(make_run: MakeRun) -> None:
    run = make_run()
    run.start()
    run.engine.wait(lambda: len(run.engine.begun) == CALLS_PER_ENGINE)
    started = time.monotonic()
    run.feed.close()
    assert time.monotonic() - started < 1
    run.open()
    run.engine.wait(lambda: len(run.engine.done) == CALLS_PER_ENGINE)
    time.sleep(0.05)
    assert len(run.engine.begun) == CALLS_PER_ENGINE
    run.feed.close()


def test_one_sample_outside_the_plan(make_run: MakeRun, made_up: ModuleType) -> None:
    """In the midst of the others, which it does not disturb."""
    run = make_run(refused=[3])
    run.open()
    run.start()
    whole, refused = (run.feed.whole(run.samples[number]) for number in (0, 3))
    assert isinstance(whole, Features)
    expected = made_up.captured(run.samples[0].input_ids_T.tolist())
    assert torch.equal(whole.taps_TNH, expected.taps_TNH)
    assert torch.equal(whole.last_TH, expected.last_TH)
    assert isinstance(refused, Quarantined)
    for step in range(STEPS):
        run.check(step, missing=[3])
