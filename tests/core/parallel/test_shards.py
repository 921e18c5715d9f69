"""The bounds of shards against their definition, written out position by position."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchspec.core.parallel.shards import Layout

small = st.integers(1, 4)
layouts = st.builds(
    Layout,
    length=st.integers(1, 200),
    ulysses=small,
    ring=small,
    alignment=st.sampled_from([1, 2, 3, 16]),
    balance=st.sampled_from(["zigzag", "contiguous"]),
    slab=st.sampled_from([1, 6, 16]),
)


def owners(layout: Layout) -> list[int]:
    """The rank of every position of the padded sequence: segments of the ring, sub-slices within them."""
    ulysses, ring, total = layout.ulysses, layout.ring, layout.padded
    if layout.balance == "contiguous" or ulysses * ring == 1:
        return [position * ulysses * ring // total for position in range(total)]
    found = []
    for position in range(total):
        segment, place = divmod(position, total // (2 * ring))
        sub = place // (total // (2 * ring * ulysses))
        first = segment < ring
        w = segment if first else 2 * ring - 1 - segment
        u = sub if first else ulysses - 1 - sub
        found.append(w * ulysses + u)
    return found


@given(layouts)
def test_every_position_has_the_owner_of_the_definition(layout: Layout) -> None:
    expected = owners(layout)
    found = [-1] * layout.padded
    for rank in range(layout.ranks):
        assert layout.positions(rank).tolist() == [p for p, owner in enumerate(expected) if owner == rank]
        for piece in layout.pieces(rank):
            for position in range(*piece):
                found[position] = rank
    assert found == expected


@given(layouts)
def test_padding_is_less_than_a_unit_and_at_the_end_alone(layout: Layout) -> None:
    def fits(rows: int) -> bool:
        """Whether a rank may own so many."""
        piece, rest = divmod(rows, layout.pieces_per_rank)
        return not rest and piece % layout.alignment == 0 and rows % layout.slab == 0

    least = next(rows for rows in count(1) if fits(rows) and rows * layout.ranks >= layout.length)
    assert (layout.rows, layout.padded) == (least, least * layout.ranks)
    assert sum(layout.true_rows(rank) for rank in range(layout.ranks)) == layout.length
    for rank in range(layout.ranks):
        assert layout.true_rows(rank) == int((layout.positions(rank) < layout.length).sum())
        assert len(layout.positions(rank)) == layout.rows


@given(layouts, st.integers(0, 12), st.data())
def test_a_cut_reads_its_pieces_and_their_halo(layout: Layout, halo: int, data: Any) -> None:
    rank = data.draw(st.integers(0, layout.ranks - 1))
    x_BT = torch.arange(1, 2 * layout.length + 1).view(2, -1)
    cut = layout.cut(x_BT, rank, halo, fill=-7)
    for piece, rows in zip(layout.pieces(rank), cut.unbind(1), strict=True):
        wanted = range(piece.start, piece.stop + halo)
        for row in (0, 1):
            assert rows[row].tolist() == [int(x_BT[row, p]) if p < layout.length else -7 for p in wanted]
    reads = [p for piece in layout.reads(rank, halo) for p in range(*piece)]
    assert reads == [
        p for piece in layout.pieces(rank) for p in range(piece.start, piece.stop + halo) if p < layout.length
    ]


@given(layouts)
def test_what_is_cut_can_be_joined(layout: Layout) -> None:
    x_BT = torch.arange(3 * layout.padded).view(1, layout.padded, 3)
    shards = [x_BT[:, layout.positions(rank)] for rank in range(layout.ranks)]
    assert torch.equal(layout.whole(shards), x_BT)
    for shard, again in zip(shards, layout.split(x_BT), strict=True):
        assert torch.equal(shard, again)
    for w in range(layout.ring):
        mine = shards[w * layout.ulysses : (w + 1) * layout.ulysses]
        joined = layout.segment_rows(w, mine)
        wanted = torch.cat([torch.arange(*segment) for segment in layout.segments(w)])
        assert torch.equal(joined, x_BT[:, wanted])
        assert sorted(wanted.tolist()) == wanted.tolist()
        for shard, again in zip(mine, layout.split(joined, w), strict=True):
            assert torch.equal(shard, again)


@given(st.integers(1, 200), small, small)
def test_zigzag_makes_causal_attention_cost_every_rank_the_same(length: int, ulysses: int, ring: int) -> None:
    layout = Layout(length=length, ulysses=ulysses, ring=ring)
    costs = {int((layout.positions(rank) + 1).sum()) for rank in range(layout.ranks)}
    assert len(costs) == 1


def test_the_lengths_of_every_rank_are_the_writers_and_the_readers() -> None:
    """1,000 tokens over 4 ranks with a halo of 1: 250 rows of each rank, whoever asks, and 3 pieces that read on."""
    layout = Layout(length=1000, ring=4, balance="contiguous")
    assert [layout.pieces(rank)[0] for rank in range(4)] == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert [layout.reads(rank, 1)[0] for rank in range(4)] == [(0, 251), (250, 501), (500, 751), (750, 1000)]


@pytest.mark.parametrize("wrong", [{"length": 0}, {"ulysses": 0}, {"ring": -1}, {"alignment": 0}, {"slab": 0}])
def test_impossible_layouts(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Layout(**({"length": 5} | wrong))
    with pytest.raises(ValueError, match="none of the 2"):
        Layout(length=5, ring=2).pieces(2)
