"""Reading the rows of a target's output head that this process holds, in tiles of the vocabulary.

Each product is made once: a tile's statistics are added to those of the tiles before it, the columns that the draft
can say are copied out, and the tile is forgotten.

Shape letters: C states, H target hidden size, V the rows of the head held here, N the draft's tokens among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import vocabulary_tile
from torchspec.core.objectives.statistics import merged, statistics
from torchspec.core.ops.slices import row_slices

OUTSIDE = -1
"""Draft index of a token that is not in the draft vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """products_CN [C, N] have the target's precision and lack its scaling; whole_3C are the `statistics` of all logits
    read, numbered as the target's tokens."""

    products_CN: Tensor
    whole_3C: Tensor


class HeadReader:
    """`columns` are the draft's tokens among the rows held here, as a range of draft indices."""

    def __init__(self, head: TargetHead, vocabulary: VocabularyMap, ops: FusedOps) -> None:
        self.head, self.vocabulary, self._ops = head, vocabulary, ops
        shards, size = head.shards, vocabulary.target_size
        self._start, self._stop = (0, size) if shards is None else shards.bounds(shards.rank)
        self.pruned = vocabulary.size < size
        self.columns = columns(vocabulary, self._start, self._stop)
        self.dtype = head.shard_VH.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self._tile = vocabulary_tile(self._stop - self._start)
        self._room: Tensor | None = None

    def draft_rows(self) -> Tensor:
        """[N, H]: the head's rows of `columns`; a view if they are all."""
        if not self.pruned:
            return self.head.shard_VH
        return self.head.shard_VH[self.vocabulary.ids_N[self.columns] - self._start]

    def products(self, normed_CH: Tensor, rows_NH: Tensor, out: Tensor | None = None) -> Tensor:
        """Of states and rows, wide, in the target's precision."""
        products = self._ops.wide_mm(normed_CH, rows_NH.T, out=out)
        if rows_NH.dtype != self.wide:
            # A target in half precision decodes from logits rounded to it: its first choice is the first of equals.
            products.copy_(products.to(rows_NH.dtype))
        return products

    def read(self, normed_CH: Tensor) -> Reading:
        """Every row held here against the states."""
        count, ids_N = len(normed_CH), self.vocabulary.ids_N
        edges = [*range(self._start, self._stop, self._tile), self._stop]
        cuts = self.vocabulary.cuts(edges)
        products_CN = normed_CH.new_empty(count, cuts[-1] - cuts[0], dtype=self.wide)
        whole_3C = statistics(normed_CH.new_empty(count, 0, dtype=self.wide))
        for (first, last), (lo, hi) in zip(pairwise(edges), pairwise(cuts), strict=True):
            rows_VH = self.head.shard_VH[first - self._start : last - self._start]
            tile_CV = self.products(normed_CH, rows_VH, self._space(count, last - first))
            said_N = ids_N[lo:hi] - first
            for part in self.slices(tile_CV):
                tile = tile_CV[part]
                products_CN[part, lo - cuts[0] : hi - cuts[0]] = tile.index_select(1, said_N)
                found = statistics(self.head.finished(tile), first, keep=False)
                whole_3C[:, part] = merged(torch.stack((whole_3C[:, part], found)))
        return Reading(products_CN=products_CN, whole_3C=whole_3C)

    def draft_index(self, token_C: Tensor) -> Tensor:
        """Draft index of target tokens, OUTSIDE where the draft cannot say them; integers in any dtype."""
        ids_N, token_C = self.vocabulary.ids_N, token_C.long()
        if not self.pruned:
            return token_C
        # The draft vocabulary is sorted: a binary search finds a token's draft index.
        at_C = torch.searchsorted(ids_N, token_C).clamp_max_(self.vocabulary.size - 1)
        return torch.where(ids_N[at_C] == token_C, at_C, OUTSIDE)

    def slices(self, x_CX: Tensor) -> Iterator[slice]:
        return row_slices(0, x_CX.shape[0], x_CX.shape[1] * x_CX.element_size(), self._ops.temporary_bytes)

    def _space(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] of a buffer that every tile uses again."""
        if self._room is None or self._room.numel() < rows * columns:
            self._room = self.head.shard_VH.new_empty(rows * self._tile, dtype=self.wide)
        return self._room[: rows * columns].view(rows, columns)


def columns(vocabulary: VocabularyMap, start: int, stop: int) -> slice:
    """The draft indices of the target's tokens [start, stop)."""
    if vocabulary.size == vocabulary.target_size:
        return slice(start, stop)
    first, last = vocabulary.cuts([start, stop])
    return slice(first, last)
