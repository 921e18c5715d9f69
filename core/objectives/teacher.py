"""The target's distributions at the rows that teach, restricted to the draft vocabulary, chunk by chunk.

Shape letters: R target rows, C rows of one chunk, H target hidden size, V target vocabulary, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import Chunk
from torchspec.core.objectives.reading import OUTSIDE, HeadReader
from torchspec.core.objectives.statistics import log_normaliser
from torchspec.core.ops.distillation import TileTeacher
from torchspec.core.ops.extremes import first_max

__all__ = ["OUTSIDE", "Coverage", "Teacher", "TeacherChunk", "covered"]

Coverage = Literal["drop", "renormalise", "weight"]


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
        self._reader = HeadReader(head, vocabulary, ops)
        self._normed_RH = normed_RH.to(self._reader.dtype)
        self._coverage, self._with_logs = coverage, with_logs
        self._kept: Survey | None = None
        self.wide = self._reader.wide

    @torch.no_grad()
    def survey(self, chunks: Sequence[Chunk]) -> Tensor:
        """Every row's coverage, for a normalisation that must know it before the pass.

        What this learns of the whole vocabulary is kept, so that the pass multiplies by the draft's rows alone.
        """
        if not chunks or not self._reader.pruned or self._coverage == "renormalise":
            return torch.ones(self._normed_RH.shape[0], dtype=self.wide, device=self._normed_RH.device)
        rows_NH = self._reader.draft_rows()
        coverage, whole, best = [], [], []
        for chunk in chunks:
            logits_CN, whole_C, best_C = self._read(chunk)
            inside_C = (logits_CN.logsumexp(-1) - whole_C).exp_().clamp_max_(1.0)
            coverage.append(covered(self._coverage, best_C, inside_C))
            whole.append(whole_C)
            best.append(best_C)
        self._kept = Survey(rows_NH=rows_NH, whole_R=torch.cat(whole), best_R=torch.cat(best))
        return torch.cat(coverage)

    @torch.no_grad()
    def chunk(self, chunk: Chunk) -> TeacherChunk:
        """The distributions of a chunk's rows."""
        pruned = self._reader.pruned
        if pruned:
            logits_CN, whole_C, best_C = self._read(chunk)
        else:
            logits_CN = self._reader.head.finished(self._products(chunk))
            best_C = torch.empty(len(logits_CN), dtype=torch.int64, device=logits_CN.device)
        probs_CN = torch.empty_like(logits_CN)
        normaliser_C, entropy_C = logits_CN.new_empty(len(logits_CN)), logits_CN.new_empty(len(logits_CN))
        for part in self._reader.slices(logits_CN):
            logits = logits_CN[part]
            if pruned:
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
        if pruned:
            inside_C = (normaliser_C - whole_C).exp_().clamp_max_(1.0)
            coverage_C = covered(self._coverage, best_C, inside_C)
            tile = TileTeacher(probs_RN=probs_CN, inside_R=inside_C, log_probs_RN=log_probs_CN)
            return TeacherChunk(tile=tile, best_C=best_C, entropy_C=entropy_C, coverage_C=coverage_C)
        tile = TileTeacher(probs_RN=probs_CN, log_probs_RN=log_probs_CN)
        return TeacherChunk(tile=tile, best_C=best_C, entropy_C=entropy_C, coverage_C=torch.ones_like(entropy_C))

    def _read(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """(logits over the draft vocabulary, log-normaliser over all V, draft index of the first choice)."""
        reader, kept = self._reader, self._kept
        if kept is not None:
            rows = slice(chunk.start, chunk.stop)
            return reader.head.finished(self._products(chunk)), kept.whole_R[rows], kept.best_R[rows]
        products_CN, whole_3C = self._read_all(chunk)
        return reader.head.finished(products_CN), log_normaliser(whole_3C), reader.draft_index(whole_3C[2])

    def _read_all(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(products with the draft's rows, `statistics` of the logits over all V)."""
        reading = self._reader.read(self._normed_RH[chunk.start : chunk.stop])
        return reading.products_CN, reading.whole_3C

    def _products(self, chunk: Chunk) -> Tensor:
        """Products with the draft's rows alone."""
        return self._reader.products(self._normed_RH[chunk.start : chunk.stop], self._draft_rows())

    def _draft_rows(self) -> Tensor:
        return self._reader.draft_rows() if self._kept is None else self._kept.rows_NH


def covered(coverage: Coverage, best_C: Tensor, inside_C: Tensor) -> Tensor:
    """How much each row counts, of its first choice's draft index and the mass inside the draft vocabulary."""
    if coverage == "renormalise":
        return torch.ones_like(inside_C)
    return inside_C if coverage == "weight" else (best_C != OUTSIDE).to(inside_C.dtype)
