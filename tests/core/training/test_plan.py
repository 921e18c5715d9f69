"""What every rank computes at every step: each sample once an epoch, cut as the batches say."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchspec.core.data.batches import global_batches, packed_micro_batches, rank_micro_batches
from torchspec.core.training import plan as plans
from torchspec.core.training.plan import Cut, Plan, Shares

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=25)
CUTS = st.one_of(
    st.builds(lambda size: Cut(micro_batch_size=size), st.integers(1, 4)),
    st.builds(
        lambda tokens, equal: Cut(micro_batch_size=1, row_tokens=tokens, equal_length=equal),
        st.integers(30, 90),
        st.sampled_from([math.inf, 20.0]),
    ),
)
SIZES = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 7), "bucket_size": st.integers(1, 3), "seed": st.integers(0, 3)}
)


def plans_of(lengths: list[int], cut: Cut, ranks: int, **sizes: Any) -> list[Plan]:
    return [Plan(lengths, cut, Shares(indices=(rank,), of=ranks), **sizes) for rank in range(ranks)]


@given(LENGTHS, CUTS, st.integers(1, 4), SIZES)
def test_all_ranks_together_hold_each_sample_once_an_epoch(
    lengths: list[int], cut: Cut, ranks: int, sizes: dict[str, int]
) -> None:
    made = plans_of(lengths, cut, ranks, **sizes)
    steps = made[0].steps_per_epoch
    for epoch in range(3):
        seen: Counter[int] = Counter()
        for step in range(epoch * steps, (epoch + 1) * steps):
            turns = [plan.turns(step) for plan in made]
            assert len(set(map(len, turns))) == 1, "ranks that run another number of passes wait for each other"
            held = Counter(
                sample
                for rank, own in enumerate(turns)
                for turn in own
                for sample in turn.micro_batches[rank].samples
            )  # fmt: skip
            assert held == Counter(made[0].batch(step))
            seen += held
            for rank, own in enumerate(turns):
                assert [(turn.step, turn.number) for turn in own] == [(step, number) for number in range(len(own))]
                assert {turn.some for turn in own} <= set(held), "a stand-in is made of a sample of the step"
                for turn in own:
                    assert turn.micro_batches.keys() == {rank}
                    samples = turn.micro_batches[rank].samples
                    rows = [[samples[place] for place in pack] for pack in turn.micro_batches[rank].packs]
                    assert sorted(sample for row in rows for sample in row) == sorted(samples)
                    if cut.row_tokens is None:
                        assert len(samples) <= cut.micro_batch_size
                    else:
                        assert sum(lengths[sample] for sample in samples) <= cut.row_tokens
        assert seen == Counter(range(len(lengths)))


@given(LENGTHS, CUTS, st.integers(1, 3), SIZES)
def test_turns_are_what_the_batches_and_their_cut_say(
    lengths: list[int], cut: Cut, ranks: int, sizes: dict[str, int]
) -> None:
    indices = range(ranks)
    plan = Plan(lengths, cut, Shares(indices=indices, of=ranks), **sizes)
    expected = [batch for epoch in range(3) for batch in global_batches(lengths, epoch=epoch, **sizes)]
    assert 3 * plan.steps_per_epoch == len(expected)
    for step, batch in enumerate(expected):
        assert plan.batch(step) == batch
        for rank in indices:
            if cut.row_tokens is None:
                own = rank_micro_batches(batch, rank=rank, world_size=ranks, micro_batch_size=cut.micro_batch_size)
            else:
                own = packed_micro_batches(
                    batch, lengths, rank=rank, world_size=ranks, row_tokens=cut.row_tokens,
                    equal_length=cut.equal_length,
                )  # fmt: skip
            assert [turn.micro_batches[rank] for turn in plan.turns(step)] == own


@given(LENGTHS, SIZES, st.integers(0, 8), st.integers(0, 12))
def test_turns_from_a_step_on_are_those_of_each_step(
    lengths: list[int], sizes: dict[str, int], start: int, count: int
) -> None:
    """A run that resumes there asks for the same ones."""
    (plan,) = plans_of(lengths, Cut(micro_batch_size=2), 1, **sizes)
    (other,) = plans_of(lengths, Cut(micro_batch_size=2), 1, **sizes)
    turns = list(plan.turns_from(start, start + count))
    assert turns == [turn for step in range(start, start + count) for turn in other.turns(step)]
    places = [(turn.step, turn.number) for turn in turns]
    assert all(a < b for a, b in pairwise(places))


@pytest.mark.parametrize("ahead", [1, 3, 4, 7])
def test_whoever_looks_ahead_into_the_next_epoch_disturbs_nobody(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are an epoch's batches made again at every step, up to an epoch ahead."""
    lengths, sizes = list(range(5, 18)), {"batch_size": 4, "bucket_size": 2, "seed": 1}
    made: list[int] = []

    def counted(*arguments: Any, epoch: int, **named: Any) -> list[list[int]]:
        made.append(epoch)
        return global_batches(*arguments, epoch=epoch, **named)

    expected = [batch for epoch in range(6) for batch in global_batches(lengths, epoch=epoch, **sizes)]
    monkeypatch.setattr(plans, "global_batches", counted)
    (plan,) = plans_of(lengths, Cut(micro_batch_size=2), 1, **sizes)
    assert plan.steps_per_epoch == 4
    for step in range(16):
        assert plan.batch(step + ahead) == expected[step + ahead]
        assert plan.batch(step) == expected[step]
    if ahead <= plan.steps_per_epoch:
        assert made == list(dict.fromkeys(made)), "made again"
