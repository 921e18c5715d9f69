"""Figures of a serving engine: its own counts, of the prompts asked for alone, held against our decoder's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from torchspec.core.data.prompts import Prompt
from torchspec.core.decoding.generation import Generation, Round
from torchspec.core.decoding.lossless import Mismatch
from torchspec.core.decoding.served import (
    OwnRun,
    ServedResult,
    ServedRun,
    ServeSettings,
    ServingMismatchError,
    check_agreement,
    serve_prompts,
    served_acceptance,
    with_space,
)
from torchspec.core.errors import DataError, TorchspecError
from torchspec.core.interfaces.engine import ServedText, ServingCounters

LENGTH = 3
ROUNDS = {1: (3, 0, 2), 2: (1,), 3: (0, 0), 4: (2, 3, 3, 1)}
"""First token of a prompt -> accepted tokens of each round of its text."""


class FakeEngine:
    """Counts as an engine does: everything since it started."""

    name, version = "fake", "1.2"

    def __init__(self, *, silent: bool = False, positions: bool = True, dies_at: int | None = None) -> None:
        """`silent`: texts don't say how their drafting went. `dies_at`: this call is answered by the next engine."""
        self.silent, self.positions, self.dies_at = silent, positions, dies_at
        self.counted: list[int] = [3, 3, 3, 3, 3, 3]  # somebody else's rounds
        self.calls: list[tuple[list[list[int]], dict[str, Any]]] = []

    def decode(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[ServedText]:
        if len(self.calls) == self.dies_at:
            self.counted = []
        asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        self.calls.append(([list(ids) for ids in prompts], asked))
        texts = []
        for ids in prompts:
            accepted = ROUNDS[ids[0]]
            self.counted += accepted
            tokens = tuple(range(1 + sum(accepted) + len(accepted)))
            texts.append(ServedText(tokens=tokens, accepted=None if self.silent else accepted))
        return texts

    def counters(self) -> ServingCounters:
        rounds = self.counted
        reached = tuple(sum(count > place for count in rounds) for place in range(LENGTH))
        return ServingCounters(
            rounds=len(rounds),
            drafted=LENGTH * len(rounds),
            accepted=sum(rounds),
            per_position=reached if self.positions else None,
        )

    def close(self) -> None:
        pass


def prompts(*first: int) -> list[Prompt]:
    return [Prompt(sample_id=f"p{token}", input_ids=(token, 50, 51)) for token in first]


def by_hand(*first: int) -> dict[str, Any]:
    """From the definition, over all rounds of these prompts."""
    rounds = [count for token in first for count in ROUNDS[token]]
    return {
        "rounds": len(rounds),
        "proposed": LENGTH * len(rounds),
        "accepted": sum(rounds),
        "per_position": [sum(count >= place for count in rounds) / len(rounds) for place in range(1, LENGTH + 1)],
        "length": 1 + sum(rounds) / len(rounds),
    }


def check(run: ServedRun, expected: dict[str, Any]) -> None:
    found = served_acceptance(run, LENGTH)
    assert (found.rounds, found.accepted) == (expected["rounds"], expected["accepted"])
    assert list(found.per_position) == pytest.approx(expected["per_position"])
    assert found.length == pytest.approx(expected["length"], abs=1e-15)
    assert 1 + sum(found.per_position) == pytest.approx(found.length)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
@pytest.mark.parametrize(("silent", "positions"), [(False, True), (True, True), (False, False)])
def test_only_these_prompts_are_counted(batch_size: int, silent: bool, positions: bool) -> None:
    """Neither what was served before nor the warm-up; per position by the engine or else by its texts."""
    engine = FakeEngine(silent=silent, positions=positions)
    run = serve_prompts(engine, prompts(1, 2, 3, 4), ServeSettings(batch_size=batch_size, draft_length=LENGTH))
    assert (run.engine, run.version) == ("fake", "1.2")
    check(run, by_hand(1, 2, 3, 4))
    assert served_acceptance(run, LENGTH).proposed == by_hand(1, 2, 3, 4)["proposed"]
    assert [len(text.tokens) for text in run.texts] == [9, 3, 3, 14]
    assert run.tokens == 29
    assert run.seconds > 0


def test_what_the_engine_is_asked() -> None:
    engine, told = FakeEngine(), []
    settings = ServeSettings(max_new_tokens=40, batch_size=3, temperature=0.5, seed=7, draft_length=LENGTH)
    serve_prompts(engine, prompts(1, 2, 3, 4), settings, stage="here", progress=lambda *facts: told.append(facts))
    warm_up, *calls = engine.calls
    assert [len(batch) for batch, _ in calls] == [3, 1]
    assert [ids[0] for batch, _ in calls for ids in batch] == [1, 2, 3, 4]
    assert all(asked == {"max_new_tokens": 40, "temperature": 0.5, "seed": 7} for _, asked in calls)
    assert warm_up == ([[1, 50, 51]], {"max_new_tokens": 16, "temperature": 0.5, "seed": 7})
    assert told == [("here", 3, 4), ("here", 4, 4)]


def test_an_engine_that_says_nothing_of_positions() -> None:
    run = serve_prompts(FakeEngine(silent=True, positions=False), prompts(1, 4), ServeSettings(draft_length=LENGTH))
    found = served_acceptance(run, LENGTH)
    assert found.per_position == ()
    assert found.length == pytest.approx(by_hand(1, 4)["length"])


def test_an_engine_that_died_on_the_way_counts_by_its_texts() -> None:
    """The next one began at nothing, so the difference of its counters would be of nothing real."""
    engine = FakeEngine(dies_at=4)  # warm-up, 1, 2, 4, then 3
    run = serve_prompts(engine, prompts(1, 2, 4, 3), ServeSettings(draft_length=LENGTH))
    assert engine.counters().rounds == 2
    check(run, by_hand(1, 2, 3, 4))


@pytest.mark.parametrize("dies_at", [2, 5, 9])
def test_an_engine_that_died_early_has_counted_more_than_the_warm_up(dies_at: int) -> None:
    engine = FakeEngine(dies_at=dies_at)
    engine.counted = []
    many = (3, 3, 3, 3, 4, 4, 4, 4, 1, 2)
    check(serve_prompts(engine, prompts(*many), ServeSettings(draft_length=LENGTH)), by_hand(*many))


def test_an_engine_that_died_and_says_nothing_cannot_be_measured() -> None:
    with pytest.raises(TorchspecError, match="its counters began anew"):
        serve_prompts(FakeEngine(silent=True, dies_at=4), prompts(1, 2, 4, 3), ServeSettings(draft_length=LENGTH))


def test_no_round_at_all() -> None:
    """Texts of one token come from the prompt alone."""
    counters = ServingCounters(rounds=0, drafted=0, accepted=0, per_position=(0, 0, 0))
    text = ServedText(tokens=(1,), accepted=())
    run = ServedRun(engine="fake", version="1", texts=(text,), counters=counters, seconds=1.0)
    found = served_acceptance(run, LENGTH)
    assert (found.length, found.per_position) == (1.0, (0.0, 0.0, 0.0))


def generation(*accepted: int) -> Generation:
    rounds = tuple(Round(slot=0, proposed=LENGTH, accepted=count, emitted=count + 1) for count in accepted)
    return Generation(prompt_tokens=3, tokens=(1,), rounds=rounds, finish="length")


def test_rounds_are_compared_prompt_by_prompt() -> None:
    run = serve_prompts(FakeEngine(), prompts(1, 2, 3), ServeSettings(draft_length=LENGTH))
    ours = OwnRun(generations=[generation(3, 0, 2), generation(0), generation(0, 0)])
    assert ours.same_rounds(run) == (2, 3)
    assert OwnRun(generations=[generation(0, 3, 2), generation(1), generation(0)]).same_rounds(run) == (1, 3)
    assert ours.acceptance(LENGTH).length == pytest.approx(1 + 5 / 6)
    partly = replace(run, texts=(run.texts[0], replace(run.texts[1], accepted=None), run.texts[2]))
    assert ours.same_rounds(partly) == (2, 2), "a silent one is no difference"
    silent = serve_prompts(FakeEngine(silent=True), prompts(1, 2, 3), ServeSettings(draft_length=LENGTH))
    assert ours.same_rounds(silent) is None


def test_prompts_that_would_meet_the_end_of_the_context_are_left_out() -> None:
    """What fits exactly stays: 100 of context, 30 new tokens, a draft of 5 and the target's own token."""
    settings = ServeSettings(max_new_tokens=30, draft_length=5)
    lengths = [0, 1, 64, 65, 200]
    given = [Prompt(sample_id=str(length), input_ids=(7,) * length) for length in lengths]
    assert [prompt.sample_id for prompt in with_space(100, given, settings)] == ["1", "64"]
    with pytest.raises(DataError, match="none of the 2 prompts leaves room for 30 new tokens and a draft of 5"):
        with_space(100, given[3:], settings)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Acceptance lengths in the engine and of our decoder."""

    served: float
    own: float | None
    mismatches: tuple[Mismatch, ...] = ()

    def result(self) -> ServedResult:
        return ServedResult(
            engine="fake", engine_version="1.2", acceptance_length=self.served, acceptance_per_position=None,
            rounds=10, drafted=30, accepted=8, tokens=20, tokens_per_second=1.0, tokens_per_second_draftless=None,
            speedup=None, lossless=not self.mismatches, mismatches=self.mismatches, own_acceptance_length=self.own,
            difference=None if self.own is None else self.served / self.own - 1, same_rounds=None,
            compared_rounds=None, prompts=4, skipped=0, draft_length=3, temperature=0.0, max_new_tokens=8,
            batch_size=1, seed=0, dtype="float32",
        )  # fmt: skip


def differing(name: str, *, tie: bool) -> Mismatch:
    return Mismatch(sample_id=name, position=6, token=1, token_draftless=2, gap=0.5, tie=tie)


@pytest.mark.parametrize(
    "case",
    [
        Case(served=2.0, own=2.0),
        Case(served=2.0, own=None),
        Case(served=2.09, own=2.0),
        Case(served=1.91, own=2.0),
        Case(served=2.0, own=2.0, mismatches=(differing("a", tie=True),)),
    ],
)
def test_agreement(case: Case) -> None:
    """Rounding is no reason to complain, and neither is a comparison that was not asked for."""
    check_agreement(case.result())


@pytest.mark.parametrize("served", [1.0, 1.89, 2.11, 4.0])
def test_other_acceptance_is_an_error_either_way(served: float) -> None:
    """More than our decoder accepts is no good news: it is another draft, or another count."""
    with pytest.raises(ServingMismatchError) as caught:
        check_agreement(Case(served=served, own=2.0).result())
    said = str(caught.value)
    assert f"fake 1.2 accepts {served:.3f} tokens per round where our decoder accepts 2.000 (limit: 5% apart)" in said
    causes = ["tap ids", "norm flags", "rotary positions", "vocabulary map", "mask token", "another target"]
    places = [said.index(cause) for cause in causes]
    assert places == sorted(places), "the likeliest cause comes first"
    assert "export the draft anew" in said


def test_the_limit_is_the_callers() -> None:
    check_agreement(Case(served=2.4, own=2.0).result(), tolerance=0.21)
    with pytest.raises(ServingMismatchError, match="limit: 1% apart"):
        check_agreement(Case(served=2.05, own=2.0).result(), tolerance=0.01)
    with pytest.raises(ServingMismatchError):
        check_agreement(Case(served=2.0000001, own=2.0).result(), tolerance=0.0)


def test_another_text_is_an_error_whatever_is_accepted() -> None:
    wrong = (differing("t", tie=True), differing("b", tie=False), differing("c", tie=False))
    message = "2 of 4 texts differ from those of fake without the draft, first 'b' at new token 6"
    with pytest.raises(ServingMismatchError, match=message) as caught:
        check_agreement(Case(served=2.0, own=2.0, mismatches=wrong).result())
    assert "tokens per round" not in str(caught.value)
    with pytest.raises(ServingMismatchError, match=rf"{message}; fake 1\.2 accepts 1\.000"):
        check_agreement(Case(served=1.0, own=2.0, mismatches=wrong).result())


@pytest.mark.parametrize(
    ("alike", "compared", "dtype", "wrong"),
    [
        (1, 4, "float32", True),
        (0, 1, "float32", True),
        (2, 4, "float32", False),
        (0, 4, "bfloat16", False),
        (0, 0, "float32", False),
        (None, None, "float32", False),
    ],
)
def test_equal_figures_of_other_rounds_are_an_error_in_float32(
    alike: int | None, compared: int | None, dtype: str, wrong: bool
) -> None:
    """Other layers of a target may serve about as well, by chance; rounding explains it in bfloat16 alone."""
    result = replace(Case(served=2.0, own=2.0).result(), same_rounds=alike, compared_rounds=compared, dtype=dtype)
    if not wrong:
        check_agreement(result)
        return
    with pytest.raises(ServingMismatchError, match=rf"round by round, in only {alike} of {compared} texts"):
        check_agreement(result)


def test_a_result_is_json_with_its_conditions() -> None:
    values = Case(served=2.0, own=2.0).result().to_json()
    assert values["drafting"] == "chain"
    assert values["averaging"] == "over drafting rounds of all prompts"
    assert {"engine", "engine_version", "draft_length", "temperature", "max_new_tokens", "batch_size", "dtype"} <= set(
        values
    )
