"""Rows of a micro-batch: documents side by side, their tokens whole on the host, one rank's share of their features.

A row holds one document, or several (packing). All rows of a micro-batch have the layout of the longest. What a rank
reads of a document's features is decided by `slices` alone, for who sends and for who receives.

Shape letters: B rows, T positions of the longest row, S rows of the sequence that a rank owns, N pieces of a rank,
L rows of a piece, F = taps x target hidden size, H target hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from torchspec.core.interfaces.features import Features, NormState
from torchspec.core.parallel.sequence import SequenceGroup
from torchspec.core.parallel.shards import Layout

PADDING = -1
"""The document of positions behind a row's end."""

Packs = Sequence[Sequence[int]]
"""For each row, which of the micro-batch's documents it holds, in order."""


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Right-padded token rows on the host. Documents are numbered over the whole micro-batch, in contiguous runs."""

    input_ids_BT: Tensor
    loss_mask_BT: Tensor
    document_BT: Tensor

    @classmethod
    def of(cls, input_ids: Sequence[Tensor], loss_masks: Sequence[Tensor], packs: Packs | None = None) -> TokenRows:
        """Of documents laid out as `packs` say; None: a row for each."""
        packs = one_each(len(input_ids)) if packs is None else packs
        documents = [torch.full_like(ids_T, number) for number, ids_T in enumerate(input_ids)]
        masks = [mask_T.bool() for mask_T in loss_masks]
        return cls(
            input_ids_BT=_rows(input_ids, packs),
            loss_mask_BT=_rows(masks, packs),
            document_BT=_rows(documents, packs, fill=PADDING),
        )

    @property
    def length(self) -> int:
        return self.document_BT.shape[1]

    @property
    def starts_BT(self) -> Tensor:
        """First position of each position's document."""
        place_T = torch.arange(self.length).expand_as(self.document_BT)
        fresh_BT = torch.ones_like(self.document_BT, dtype=torch.bool)
        fresh_BT[:, 1:] = self.document_BT[:, 1:] != self.document_BT[:, :-1]
        return torch.where(fresh_BT, place_T, 0).cummax(dim=1).values


@dataclass(frozen=True, kw_only=True)
class FeatureRows:
    """A micro-batch as one rank computes it. Without `sequence` the rank owns every row and pieces have no halo.

    taps_BSF    the target's taps at the rows that this rank owns, in tap order
    last_BXH    its last hidden states there, each piece followed by the algorithm's halo: X = N (L + halo)
    """

    tokens: TokenRows
    layout: Layout
    taps_BSF: Tensor
    last_BXH: Tensor
    norm_state: NormState
    sequence: SequenceGroup | None = None

    @property
    def rank(self) -> int:
        """Among those that share the sequence."""
        return 0 if self.sequence is None else self.sequence.rank

    @classmethod
    def of(
        cls,
        features: Sequence[Features],
        loss_masks: Sequence[Tensor],
        packs: Packs | None = None,
        slab: int = 1,
    ) -> FeatureRows:
        """Of whole documents on the only rank, in rows padded to a multiple of `slab`; a single one without padding is
        not copied."""
        tokens = TokenRows.of([f.input_ids_T.cpu() for f in features], [mask_T.cpu() for mask_T in loss_masks], packs)
        packs = one_each(len(features)) if packs is None else packs
        layout = Layout(length=tokens.length, slab=slab)
        behind = layout.padded - layout.length
        return cls(
            tokens=tokens,
            layout=layout,
            taps_BSF=_padded(_rows([f.taps_TNH.flatten(1) for f in features], packs), behind),
            last_BXH=_padded(_rows([f.last_TH for f in features], packs), behind),
            norm_state=common_state([f.norm_state for f in features]),
        )


def one_each(documents: int) -> Packs:
    return [[number] for number in range(documents)]


def common_state(states: Sequence[NormState]) -> NormState:
    assert len(set(states)) == 1, f"one engine writes one norm state, got {set(states)}"
    return states[0]


def _rows(documents: Sequence[Tensor], packs: Packs, fill: float = 0) -> Tensor:
    rows = [torch.cat([documents[n] for n in pack]) if len(pack) > 1 else documents[pack[0]] for pack in packs]
    return rows[0][None] if len(rows) == 1 else pad_sequence(rows, batch_first=True, padding_value=fill)


def _padded(x_BTZ: Tensor, behind: int) -> Tensor:
    return F.pad(x_BTZ, (0, 0, 0, behind)) if behind else x_BTZ


class Slice(NamedTuple):
    """Rows [start, stop) of a document, which stand in `row` from `place` of the [N (L + halo)] on."""

    document: int
    start: int
    stop: int
    row: int
    place: int


def slices(lengths: Sequence[int], packs: Packs, layout: Layout, rank: int, halo: int) -> list[Slice]:
    """What the rank reads of documents of these lengths, in order of row and position."""
    found = []
    for row, pack in enumerate(packs):
        ends = list(accumulate(lengths[number] for number in pack))
        for piece, (first, last) in enumerate(layout.reads(rank, halo)):
            begin = piece * (layout.piece_length + halo)
            for number, end in zip(pack, ends, strict=True):
                offset = end - lengths[number]
                start, stop = max(first, offset), min(last, end)
                if start < stop:
                    found.append(Slice(number, start - offset, stop - offset, row, begin + start - first))
    return found


def placed(wanted: Sequence[Slice], read: Callable[[int], Tensor], rows: int, places: int, like: Tensor) -> Tensor:
    """[rows, places, ...] with `read(n)` where the n-th slice stands, and zeros elsewhere; `like` gives the rest."""
    out = like.new_zeros(rows, places, *like.shape[1:])
    for number, part in enumerate(wanted):
        out[part.row, part.place : part.place + part.stop - part.start] = read(number)
    return out
