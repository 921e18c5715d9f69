"""The target's distributions at the rows that teach, restricted to the draft vocabulary, chunk by chunk.

The head is read in tiles of the vocabulary, each product made once: a tile's maximum, argmax and normaliser are
added to those of the tiles before it, the columns that the draft can say are copied out, and the tile is forgotten.

Shape letters: R target rows, C rows of one chunk, H target hidden size, V target vocabulary, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import Chunk, vocabulary_tile
from torchspec.core.ops.distillation import TileTeacher
from torchspec.core.ops.extremes import first_max
from torchspec.core.ops.slices import row_slices

Coverage = Literal["drop", "renormalise", "weight"]
OUTSIDE = -1
"""Draft index of a token that is not in the draft vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TeacherChunk:
    """The target at C rows.

    tile          its probabilities over the draft vocabulary
    best_C        draft index of the target's first choice among all V tokens, OUTSIDE if the draft cannot say it
    entropy_C     of the probabilities over the draft vocabulary, in nats
    coverage_C    how much the row counts in the loss (docs/concepts.md): 0 or 1, always 1, or the mass inside
    """

    tile: TileTeacher
    best_C: Tensor
    entropy_C: Tensor
    coverage_C: Tensor


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a first reading of the head leaves for the pass; rows_NH are the head's rows of the draft vocabulary."""

    rows_NH: Tensor
    whole_R: Tensor
    best_R: Tensor


class Teacher:
    """Reads the target's head over given hidden states, `normed_RH`, which are after the final norm; no gradients.

    `with_logs` keeps log-probabilities for the terms that need them.
    """

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
        self._head, self._vocabulary, self._ops = head, vocabulary, ops
        self._normed_RH = normed_RH.to(head.head_VH.dtype)
        self._coverage, self._with_logs = coverage, with_logs
        self._pruned = vocabulary.size < vocabulary.target_size
        self._tile = vocabulary_tile(vocabulary.target_size)
        self._kept: Survey | None = None
        self._room: Tensor | None = None
        self.wide = torch.promote_types(head.head_VH.dtype, torch.float32)

    @torch.no_grad()
    def survey(self, chunks: Sequence[Chunk]) -> Tensor:
        """Every row's coverage, for a normalisation that must know it before the pass.

        What this learns of the whole vocabulary is kept, so that the pass multiplies by the draft's rows alone.
        """
        if not chunks or not self._pruned or self._coverage == "renormalise":
            return torch.ones(self._normed_RH.shape[0], dtype=self.wide, device=self._normed_RH.device)
        rows_NH = self._head.head_VH[self._vocabulary.ids_N]
        coverage, whole, best = [], [], []
        for chunk in chunks:
            logits_CN, whole_C, best_C = self._read(chunk.start, chunk.stop)
            coverage.append(self._covered(best_C, (logits_CN.logsumexp(-1) - whole_C).exp_().clamp_max_(1.0)))
            whole.append(whole_C)
            best.append(best_C)
        self._kept = Survey(rows_NH=rows_NH, whole_R=torch.cat(whole), best_R=torch.cat(best))
        return torch.cat(coverage)

    @torch.no_grad()
    def chunk(self, start: int, stop: int) -> TeacherChunk:
        """The distributions of rows [start, stop)."""
        if self._pruned:
            logits_CN, whole_C, best_C = self._read(start, stop)
        else:
            logits_CN = self._logits(self._normed_RH[start:stop], self._head.head_VH)
            best_C = torch.empty(len(logits_CN), dtype=torch.int64, device=logits_CN.device)
        probs_CN = torch.empty_like(logits_CN)
        normaliser_C, entropy_C = logits_CN.new_empty(len(logits_CN)), logits_CN.new_empty(len(logits_CN))
        for part in self._slices(logits_CN):
            logits = logits_CN[part]
            if self._pruned:
                top = logits.amax(-1)
            else:
                top, best_C[part] = first_max(logits)
            probs = torch.softmax(logits, -1, out=probs_CN[part])
            normaliser = top - probs.amax(-1).log_()  # the largest probability cannot underflow
            normaliser_C[part] = normaliser
            # A token of logit -inf has probability 0 and adds nothing to the entropy.
            finite = logits.clamp_min_(torch.finfo(self.wide).min)
            entropy_C[part] = normaliser - torch.linalg.vecdot(probs, finite)
        log_probs_CN = logits_CN.sub_(normaliser_C[:, None]) if self._with_logs else None
        if self._pruned:
            inside_C = (normaliser_C - whole_C).exp_().clamp_max_(1.0)
            coverage_C = self._covered(best_C, inside_C)
            tile = TileTeacher(probs_RN=probs_CN, inside_R=inside_C, log_probs_RN=log_probs_CN)
            return TeacherChunk(tile=tile, best_C=best_C, entropy_C=entropy_C, coverage_C=coverage_C)
        tile = TileTeacher(probs_RN=probs_CN, log_probs_RN=log_probs_CN)
        return TeacherChunk(tile=tile, best_C=best_C, entropy_C=entropy_C, coverage_C=torch.ones_like(entropy_C))

    def _covered(self, best_C: Tensor, inside_C: Tensor) -> Tensor:
        if self._coverage == "renormalise":
            return torch.ones_like(inside_C)
        return inside_C if self._coverage == "weight" else (best_C != OUTSIDE).to(inside_C.dtype)

    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """(logits over the draft vocabulary, log-normaliser over all V, draft index of the first choice)."""
        normed_CH = self._normed_RH[start:stop]
        if self._kept is not None:
            logits_CN = self._logits(normed_CH, self._kept.rows_NH)
            return logits_CN, self._kept.whole_R[start:stop], self._kept.best_R[start:stop]
        vocabulary = self._vocabulary
        count = stop - start
        edges = [*range(0, vocabulary.target_size, self._tile), vocabulary.target_size]
        cuts = vocabulary.cuts(edges)
        logits_CN = normed_CH.new_empty(count, vocabulary.size, dtype=self.wide)
        top_C = normed_CH.new_full((count,), -torch.inf, dtype=self.wide)
        whole_C, best_C = top_C.clone(), torch.zeros(count, dtype=torch.int64, device=top_C.device)
        for (first, last), (lo, hi) in zip(pairwise(edges), pairwise(cuts), strict=True):
            tile_CV = self._logits(normed_CH, self._head.head_VH[first:last], self._space(count, last - first))
            said_N = vocabulary.ids_N[lo:hi] - first
            for part in self._slices(tile_CV):
                tile = tile_CV[part]
                logits_CN[part, lo:hi] = tile.index_select(1, said_N)
                highest, place = first_max(tile)
                share = torch.softmax(tile, -1, out=tile)
                torch.logaddexp(whole_C[part], highest - share.amax(-1).log_(), out=whole_C[part])
                best_C[part] = torch.where(highest > top_C[part], place + first, best_C[part])
                torch.maximum(top_C[part], highest, out=top_C[part])
        # The draft vocabulary is sorted: a binary search finds a token's draft index.
        at_C = torch.searchsorted(vocabulary.ids_N, best_C).clamp_max_(vocabulary.size - 1)
        return logits_CN, whole_C, torch.where(vocabulary.ids_N[at_C] == best_C, at_C, OUTSIDE)

    def _logits(self, normed_CH: Tensor, rows_VH: Tensor, out: Tensor | None = None) -> Tensor:
        products = self._ops.wide_mm(normed_CH, rows_VH.T, out=out)
        if rows_VH.dtype != self.wide:
            # A target in half precision decodes from logits rounded to it: its first choice is the first of equals.
            products.copy_(products.to(rows_VH.dtype))
        return self._head.finished(products)

    def _slices(self, x_CX: Tensor) -> Iterator[slice]:
        return row_slices(0, x_CX.shape[0], x_CX.shape[1] * x_CX.element_size(), self._ops.temporary_bytes)

    def _space(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] of a buffer that every tile uses again."""
        if self._room is None or self._room.numel() < rows * columns:
            self._room = self._normed_RH.new_empty(rows * self._tile, dtype=self.wide)
        return self._room[: rows * columns].view(rows, columns)
