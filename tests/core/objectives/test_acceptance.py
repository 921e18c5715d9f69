"""Prefix lengths and the walk against a literal simulation, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchspec.core.objectives.acceptance import acceptance_sums, prefix_lengths, summarise_acceptance


def accepted(agree: list[list[bool]], i: int, steps: int) -> int:
    count = 0
    while count < steps and agree[i][count]:
        count += 1
    return count


def simulate(agree: list[list[bool]], mask: list[bool], document: list[int], steps: int) -> list[tuple[int, int]]:
    """(slot, accepted) of every round of decoding one row: span by span, as docs/concepts.md says."""
    length, rounds = len(mask), []
    s = 0
    while s < length:
        if not mask[s]:
            s += 1
            continue
        e = s
        while e + 1 < length and mask[e + 1] and document[e + 1] == document[s]:
            e += 1
        opens_document = s == 0 or document[s - 1] != document[s]
        i = s if opens_document else s - 1
        while i + 1 + steps <= e:
            count = accepted(agree, i, steps)
            rounds.append((i, count))
            i = i + 1 + count
        s = e + 1
    return rounds


def all_rounds(agree: list[list[bool]], mask: list[bool], document: list[int], steps: int) -> list[int]:
    """Accepted count of every slot whose whole round lies in one supervised span."""
    found = []
    for i in range(len(mask)):
        needed = range(i + 1, i + 2 + steps)
        if all(j < len(mask) and mask[j] and document[j] == document[i] for j in needed):
            found.append(accepted(agree, i, steps))
    return found


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    steps, length = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    likely = st.sampled_from([True, True, True, False])
    batch = draw(st.integers(1, 3))
    mask = [draw(st.lists(likely, min_size=length, max_size=length)) for _ in range(batch)]
    cuts = [draw(st.sets(st.integers(0, length))) for _ in range(batch)]
    document = [[sum(cut <= j for cut in cut_set) for j in range(length)] for cut_set in cuts]
    cells = st.lists(likely, min_size=length * steps, max_size=length * steps)
    agree = torch.tensor([draw(cells) for _ in range(batch)]).view(batch, length, steps)
    return agree, torch.tensor(mask), torch.tensor(document)


@settings(max_examples=100, deadline=None)
@given(rows())
def test_sums_are_those_of_the_simulation(case: tuple[Tensor, Tensor, Tensor]) -> None:
    agree, mask, document = case
    steps = agree.shape[-1]
    arguments = list(zip(agree.tolist(), mask.tolist(), document.tolist(), strict=True))
    walks = [simulate(*row, steps) for row in arguments]
    counts = [count for walk in walks for _, count in walk]
    every = [count for row in arguments for count in all_rounds(*row, steps)]

    sums = acceptance_sums(prefix_lengths(agree), steps, mask, document)

    assert int(sums["walk_rounds"]) == len(counts)
    assert sums["walk_hits"].tolist() == [sum(count > k for count in counts) for k in range(steps)]
    assert int(sums["whole_slots"]) == len(every)
    assert sums["whole_hits"].tolist() == [sum(count > k for count in every) for k in range(steps)]
    figures = summarise_acceptance(sums)
    length = figures["simulated_acceptance_length"]
    assert length == pytest.approx(1 + sum(counts) / len(counts) if counts else math.nan, nan_ok=True)
    joint = 1 + sum(every) / len(every) if every else math.nan
    assert figures["joint_prefix_length"] == pytest.approx(joint, nan_ok=True)


def test_prefix_stops_at_the_first_miss() -> None:
    agree = torch.tensor([[[True, True, False], [False, True, True], [True, True, True]]])
    assert prefix_lengths(agree).tolist() == [[2, 0, 3]]


def test_decoding_lingers_where_drafting_is_hard() -> None:
    """Ten easy slots, ten hard ones, in turn: half of all slots are perfect, but most rounds fall on the hard ones."""
    length, steps = 200, 4
    easy_S = torch.arange(length) // 10 % 2 == 0
    agree = easy_S[None, :, None].expand(1, length, steps)
    mask = torch.ones(1, length, dtype=torch.bool)
    document = torch.zeros(1, length, dtype=torch.int64)
    figures = summarise_acceptance(acceptance_sums(prefix_lengths(agree), steps, mask, document))
    rounds = simulate(agree[0].tolist(), [True] * length, [0] * length, steps)
    assert figures["simulated_acceptance_length"] == 1 + sum(c for _, c in rounds) / len(rounds)
    assert figures["simulated_acceptance_length"] < 1.8
    assert figures["joint_prefix_length"] > 2.9
