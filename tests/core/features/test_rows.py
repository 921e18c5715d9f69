"""Which rows of which documents a rank reads, and where they stand, against looking each one up."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchspec.core.features.rows import PADDING, FeatureRows, TokenRows, placed, slices
from torchspec.core.interfaces.features import Features
from torchspec.core.parallel.shards import Layout


@st.composite
def micro_batches(draw: Any) -> tuple[list[int], list[list[int]]]:
    """Lengths of documents, and rows that hold each of them once."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    order = draw(st.permutations(range(len(lengths))))
    cuts = sorted(draw(st.sets(st.integers(1, len(lengths) - 1)))) if len(lengths) > 1 else []
    edges = [0, *cuts, len(lengths)]
    return lengths, [list(order[a:b]) for a, b in pairwise(edges)]


@given(micro_batches(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.data())
def test_a_rank_reads_what_its_pieces_hold(
    batch: tuple[list[int], list[list[int]]], ulysses: int, ring: int, halo: int, data: Any
) -> None:
    lengths, packs = batch
    documents = [torch.arange(length) + 100 * (number + 1) for number, length in enumerate(lengths)]
    rows = [torch.cat([documents[n] for n in pack]) for pack in packs]
    layout = Layout(length=max(map(len, rows)), ulysses=ulysses, ring=ring)
    rank = data.draw(st.integers(0, layout.ranks - 1))
    wanted = slices(lengths, packs, layout, rank, halo)
    places = layout.pieces_per_rank * (layout.piece_length + halo)
    found = placed(
        wanted, lambda n: documents[wanted[n].document][wanted[n].start : wanted[n].stop], len(packs), places,
        documents[0][:0],
    )  # fmt: skip
    for row, whole in enumerate(rows):
        expected = [
            int(whole[p]) if p < len(whole) else 0
            for piece in layout.pieces(rank)
            for p in range(piece.start, piece.stop + halo)
        ]
        assert found[row].tolist() == expected


@given(micro_batches(), st.sampled_from([1, 16]))
def test_rows_hold_their_documents_one_after_the_other(batch: tuple[list[int], list[list[int]]], slab: int) -> None:
    """And zeros behind them, where what a rank owns is to be a multiple of a slab."""
    lengths, packs = batch
    ids = [torch.arange(length) + 100 * (number + 1) for number, length in enumerate(lengths)]
    features = [
        Features(
            input_ids_T=ids_T,
            taps_TNH=ids_T[:, None, None].float().expand(-1, 2, 3),
            last_TH=ids_T[:, None].float().expand(-1, 3),
            tap_layers=(0, 1),
            norm_state="pre_norm",
        )
        for ids_T in ids
    ]
    masks = [ids_T % 3 == 0 for ids_T in ids]
    rows = FeatureRows.of(features, masks, packs, slab)
    longest = max(sum(lengths[n] for n in pack) for pack in packs)
    assert (rows.rank, rows.sequence, rows.tokens.length) == (0, None, longest)
    behind = -longest % slab
    assert rows.layout.padded == longest + behind

    def laid(values: list[Tensor], fill: int) -> list[list[int]]:
        made = [[int(v) for n in pack for v in values[n]] for pack in packs]
        return [row + [fill] * (rows.tokens.length - len(row)) for row in made]

    assert rows.tokens.input_ids_BT.tolist() == laid(ids, 0)
    assert rows.tokens.loss_mask_BT.long().tolist() == laid(masks, 0)
    numbers = [torch.full_like(ids_T, n) for n, ids_T in enumerate(ids)]
    assert rows.tokens.document_BT.tolist() == laid(numbers, PADDING)
    for found_BS in (rows.taps_BSF[..., -1], rows.last_BXH[..., 0]):
        assert found_BS.long().tolist() == [row + [0] * behind for row in laid(ids, 0)]


def test_documents_start_where_they_change() -> None:
    tokens = TokenRows(
        input_ids_BT=torch.zeros(1, 8, dtype=torch.int64),
        loss_mask_BT=torch.zeros(1, 8, dtype=torch.bool),
        document_BT=torch.tensor([[4, 4, 4, 0, 0, 7, -1, -1]]),
    )
    assert tokens.starts_BT.tolist() == [[0, 0, 0, 3, 3, 5, 6, 6]]
