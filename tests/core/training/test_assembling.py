"""Rows put together from parts are what looking each token up in its whole row gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchspec.core.features.parts import part_of
from torchspec.core.interfaces.features import Features
from torchspec.core.parallel.sequence import SequenceGroup
from torchspec.core.training.assembling import assembled, parts_of
from torchspec.core.training.capturing import Documents


@dataclass(frozen=True)
class Seat:
    """A rank's place in a group."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


class Told:
    """Communication in which the other ranks have said their part already. `flags`: what they found together."""

    def __init__(self, flags: Tensor) -> None:
        self.flags = flags

    def all_reduce(self, tensor: Tensor, group: Any) -> Tensor:
        return tensor + self.flags


def sequence(rank: int, ulysses: int, ring: int, others: Sequence[bool] = ()) -> SequenceGroup:
    flags: Any = Told(torch.tensor(others, dtype=torch.int32))
    groups: list[Any] = [Seat(rank, ulysses * ring), Seat(rank % ulysses, ulysses), Seat(rank // ulysses, ring)]
    return SequenceGroup(communication=flags, group=groups[0], ulysses=groups[1], ring=groups[2])


def documents(made_up: ModuleType, lengths: Sequence[int], packs: Sequence[Sequence[int]]) -> Documents:
    samples = [made_up.sample(number, length) for number, length in enumerate(lengths)]
    return Documents(indices=tuple(range(len(lengths))), samples=samples, packs=packs)


def parts_at(
    made_up: ModuleType, held: Documents, sharing: SequenceGroup, halo: int, missing: Sequence[int] = ()
) -> dict[int, Features]:
    """What the rank is given: of each document, made whole, its part."""
    return {
        number: part_of(made_up.captured(held.samples[number].input_ids_T.tolist()), parts[sharing.rank])
        for number, parts in enumerate(parts_of(held, sharing, halo))
        if parts[sharing.rank] and number not in missing
    }


@st.composite
def micro_batches(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Lengths of documents, and rows that hold each of them once."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    order = draw(st.permutations(range(len(lengths))))
    cuts = sorted(draw(st.sets(st.integers(1, len(lengths) - 1)))) if len(lengths) > 1 else []
    return lengths, [list(order[a:b]) for a, b in pairwise([0, *cuts, len(lengths)])]


SHAPES = st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (2, 3)])


@settings(deadline=None)  # cores are shared
@given(micro_batches(), SHAPES, st.integers(0, 5), st.data())
def test_each_ranks_rows_of_parts_are_those_looked_up(
    made_up: ModuleType,
    batch: tuple[list[int], list[list[int]]],
    shape: tuple[int, int],
    halo: int,
    data: st.DataObject,
) -> None:
    """With documents that some ranks could not get: none is trained, and each is empty only where it is missing."""
    held = documents(made_up, *batch)
    numbers = st.sets(st.sampled_from(range(len(held.samples))), max_size=2)
    for rank in range(shape[0] * shape[1]):
        mine, others = sorted(data.draw(numbers)), sorted(data.draw(numbers))
        sharing = sequence(rank, *shape, others=[number in others for number in range(len(held.samples))])
        taken = parts_at(made_up, held, sharing, halo, missing=mine)
        reasons = {number: f"why {number}" for number in mine}
        rows, holes = assembled(made_up.model(halo), held, taken, reasons, sharing)
        longest = max(sum(len(held.samples[n].input_ids_T) for n in pack) for pack in held.packs)
        layout = sharing.layout(longest)
        expected = made_up.looked_up(held, layout, rank, halo)
        made_up.check(made_up.tensors(rows), made_up.emptied(expected, mine, {*mine, *others}))
        assert holes == {number: reasons.get(number, "") for number in {*mine, *others}}
        assert (rows.layout, rows.norm_state, rows.sequence) == (layout, "post_norm", sharing)


@settings(deadline=None)
@given(micro_batches(), st.sampled_from(["pre_norm", "post_norm"]), st.data())
def test_whole_documents_where_nobody_shares(
    made_up: ModuleType, batch: tuple[list[int], list[list[int]]], state: Any, data: st.DataObject
) -> None:
    held = documents(made_up, *batch)
    missing = sorted(data.draw(st.sets(st.sampled_from(range(len(held.samples))), max_size=2)))
    taken = {
        number: made_up.captured(each.input_ids_T.tolist(), state)
        for number, each in enumerate(held.samples)
        if number not in missing
    }
    reasons = {number: f"why {number}" for number in missing}
    rows, holes = assembled(made_up.model(3), held, taken, reasons, None)
    assert holes == reasons
    assert (rows.sequence, rows.norm_state) == (None, state if taken else "post_norm")
    expected = made_up.emptied(made_up.looked_up(held, rows.layout, 0, 0), missing, missing)
    if rows.norm_state == "pre_norm":
        expected["last_BXH"] = expected["last_BXH"] / 2  # whoever computes with the rows applies the norm
    made_up.check(made_up.tensors(rows), expected)


@pytest.mark.parametrize("halo", [0, 1, 3])
def test_a_document_that_begins_inside_a_halo(made_up: ModuleType, halo: int) -> None:
    """8 rows on 2 ranks: rank 0 owns [0, 2) and [6, 8), rank 1 [2, 6) in two pieces. The second document begins at 3,
    within the halo of rank 0's first piece and within rank 1's."""
    held = documents(made_up, [3, 5], [[0, 1]])
    whole = made_up.looked_up(held, sequence(0, 2, 1).layout(8), 0, halo)
    parts = parts_of(held, sequence(0, 2, 1), halo)
    expected: dict[int, Any] = {
        0: [[((0, 2),), ((2, 3),)], [((3, 5),), ((0, 1), (1, 3))]],
        1: [[((0, 3),), ((2, 3),)], [((3, 5),), ((0, 2), (1, 4))]],
        3: [[((0, 3),), ((2, 3),)], [((0, 2), (3, 5)), ((0, 4), (1, 5))]],
    }
    assert parts == expected[halo]
    rows, _ = assembled(made_up.model(halo), held, parts_at(made_up, held, sequence(0, 2, 1), halo), {},
                        sequence(0, 2, 1, others=[False, False]))  # fmt: skip
    made_up.check(made_up.tensors(rows), whole)


def test_a_rank_that_reads_nothing_of_a_document_is_given_nothing_of_it(made_up: ModuleType) -> None:
    held = documents(made_up, [2, 9], [[0], [1]])
    parts = parts_of(held, sequence(0, 2, 1), 1)
    assert parts[0][1] == (), "rows of 9 in pieces of 3: rank 1 owns [3, 9)"
    rows, _ = assembled(made_up.model(1), held, parts_at(made_up, held, sequence(1, 2, 1), 1), {},
                        sequence(1, 2, 1, others=[False, False]))  # fmt: skip
    made_up.check(made_up.tensors(rows), made_up.looked_up(held, rows.layout, 1, 1))
    assert not rows.taps_BSF[0].any()
