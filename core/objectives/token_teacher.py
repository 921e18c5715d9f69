"""The target's distributions where ranks share its head, and each rank takes its own rows' logits home.

Of a chunk the hidden states of all ranks are gathered; every rank multiplies them by its part of the head; and one
all-to-all turns (all ranks' rows, part of the vocabulary) into (this rank's rows, whole vocabulary). Of a pruned
vocabulary only the draft's columns and three statistics a row travel.

Shape letters: P ranks, C rows of this rank's chunk, A rows of all ranks' chunks, H target hidden size, N draft
vocabulary, X columns that a rank sends.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import Chunk, SharedChunk
from torchspec.core.objectives.reading import columns
from torchspec.core.objectives.statistics import merged
from torchspec.core.objectives.teacher import Coverage, Teacher
from torchspec.core.parallel.vocabulary import gather_rows, to_owners


class TokenTeacher(Teacher):
    """A `Teacher` over a divided head; its methods are collectives and take chunks of `plan_shared_chunks`."""

    def __init__(
        self,
        head: TargetHead,
        normed_RH: Tensor,
        vocabulary: VocabularyMap,
        ops: FusedOps,
        *,
        coverage: Coverage = "drop",
        with_logs: bool = False,
    ) -> None:
        super().__init__(head, normed_RH, vocabulary, ops, coverage=coverage, with_logs=with_logs)
        assert head.shards is not None
        self._shards = head.shards
        every = [columns(vocabulary, *head.shards.bounds(rank)) for rank in range(head.shards.size)]
        self._widths = [own.stop - own.start for own in every]

    def _read_all(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        reading = self._reader.read(self._gathered(chunk))
        # Products have the target's precision and travel in it; beside them stand the bytes of the wide statistics.
        bytes_AX = reading.whole_3C.T.contiguous().view(self._reader.dtype)
        received_PCX = self._home(chunk, reading.products_CN, bytes_AX)
        # A copy in any case: of a single row the part is contiguous already, but not aligned.
        whole_PC3 = received_PCX[..., max(self._widths) :].clone(memory_format=torch.contiguous_format).view(self.wide)
        return self._side_by_side(received_PCX), merged(whole_PC3.transpose(1, 2))

    def _products(self, chunk: Chunk) -> Tensor:
        products_AN = self._reader.products(self._gathered(chunk), self._draft_rows())
        return self._side_by_side(self._home(chunk, products_AN))

    def _gathered(self, chunk: Chunk) -> Tensor:
        assert isinstance(chunk, SharedChunk)
        return gather_rows(self._normed_RH[chunk.start : chunk.stop], chunk.rows_P, self._shards)

    def _home(self, chunk: Chunk, products_AN: Tensor, *beside_AX: Tensor) -> Tensor:
        """[P, C, X]: of this rank's rows, from every rank its products, padded to the most, and what stands beside."""
        assert isinstance(chunk, SharedChunk)
        padded_AX = F.pad(products_AN.to(self._reader.dtype), (0, max(self._widths) - products_AN.shape[1]))
        return to_owners(torch.cat((padded_AX, *beside_AX), dim=1), chunk.rows_P, self._shards)

    def _side_by_side(self, received_PCX: Tensor) -> Tensor:
        """[C, N], wide."""
        parts = [part_CX[:, :width] for part_CX, width in zip(received_PCX, self._widths, strict=True)]
        return torch.cat(parts, dim=1).to(self.wide)
