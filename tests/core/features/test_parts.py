"""A part of a record is the rows that were asked for, one by one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.features.parts import part_of
from torchspec.core.interfaces.features import Features

LENGTH = 12


def record() -> Features:
    """Every row tells which it is."""
    place_T = torch.arange(LENGTH)
    return Features(
        input_ids_T=place_T + 50,
        taps_TNH=(place_T[:, None, None] + torch.tensor([0.25, 0.5])[:, None]).expand(-1, 2, 3).clone(),
        last_TH=place_T[:, None].expand(-1, 3) + 100.0,
        tap_layers=(1, 4),
        norm_state="pre_norm",
    )


@st.composite
def pieces(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """They may overlap and come in any order: a halo reads what the next piece owns."""
    one = st.tuples(st.integers(0, LENGTH - 1), st.integers(1, LENGTH)).filter(lambda pair: pair[0] < pair[1])
    return tuple(draw(st.lists(one, min_size=1, max_size=4)))


@given(pieces())
def test_a_part_holds_its_rows_in_the_order_that_they_were_asked_for(rows: tuple[tuple[int, int], ...]) -> None:
    whole, part = record(), part_of(record(), rows)
    wanted = [place for start, stop in rows for place in range(start, stop)]
    assert part.input_ids_T.tolist() == [int(whole.input_ids_T[place]) for place in wanted]
    for number, place in enumerate(wanted):
        assert torch.equal(part.taps_TNH[number], whole.taps_TNH[place])
        assert torch.equal(part.last_TH[number], whole.last_TH[place])
    assert len(part.taps_TNH) == len(part.last_TH) == len(wanted)
    assert (part.tap_layers, part.norm_state) == (whole.tap_layers, whole.norm_state)
    store = MemoryStore()
    assert take(store, store.put("a", part)) is part, "it is a record like any other"


def test_a_single_piece_is_not_copied() -> None:
    whole = record()
    part = part_of(whole, [(3, 7)])
    for mine, its in ((part.taps_TNH, whole.taps_TNH), (part.last_TH, whole.last_TH)):
        assert mine.data_ptr() == its[3:].data_ptr()
