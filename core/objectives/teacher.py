"""The target's distributions at the rows that teach, restricted to the draft vocabulary, chunk by chunk.

Shape letters: R target rows, C rows of one chunk, H target hidden size, V target vocabulary, N draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchspec.core.interfaces.target import TargetHead, VocabularyMap

Coverage = Literal["drop", "renormalise", "weight"]
OUTSIDE = -1
"""Draft index of a token that is not in the draft vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TeacherChunk:
    """The target at C rows.

    probs_CN     normalised over the draft vocabulary
    full_CN      the same tokens' probabilities normalised over all V
    best_C       draft index of the target's first choice among all V tokens, OUTSIDE if the draft cannot say it
    entropy_C    of probs_CN, in nats
    """

    probs_CN: Tensor
    full_CN: Tensor
    best_C: Tensor
    entropy_C: Tensor


class Teacher:
    """Reads the target's head over given hidden states; nothing here has a gradient.

    `normed_RH` are last hidden states after the final norm. With a pruned vocabulary the whole head is needed once
    per row, for the normaliser and the first choice; that comes first, since it decides which rows count, in pieces
    of `survey_rows`.
    """

    @torch.no_grad()
    def __init__(self, head: TargetHead, normed_RH: Tensor, vocabulary: VocabularyMap, survey_rows: int) -> None:
        self._head, self._normed_RH, self._ids_N = head, normed_RH, vocabulary.ids_N
        self._pruned = vocabulary.size < vocabulary.target_size
        self._rows_NH = head.head_VH[vocabulary.ids_N] if self._pruned else head.head_VH
        if self._pruned:
            surveyed = [self._survey(normed_CH) for normed_CH in torch.split(normed_RH, survey_rows)]
            self._best_R = torch.cat([best_C for best_C, _ in surveyed])
            self._inside_R = torch.cat([inside_C for _, inside_C in surveyed])

    def weight_R(self, coverage: Coverage) -> Tensor:
        """How much each row counts in the loss (docs/concepts.md): 0 or 1, always 1, or the mass inside."""
        if not self._pruned or coverage == "renormalise":
            wide = torch.promote_types(self._normed_RH.dtype, torch.float32)
            return torch.ones(self._normed_RH.shape[0], dtype=wide, device=self._normed_RH.device)
        return self._inside_R if coverage == "weight" else (self._best_R != OUTSIDE).to(self._inside_R.dtype)

    @torch.no_grad()
    def chunk(self, start: int, stop: int) -> TeacherChunk:
        """The distributions of rows [start, stop); this is the only place where [C, N] is made."""
        log_CN = self._head.logits(self._normed_RH[start:stop], self._rows_NH).log_softmax(-1)
        probs_CN = log_CN.exp()
        # A token of logit -inf has probability 0 and adds nothing to the entropy.
        entropy_C = -(probs_CN * log_CN.clamp_min(torch.finfo(log_CN.dtype).min)).sum(-1)
        if self._pruned:
            best_C, full_CN = self._best_R[start:stop], probs_CN * self._inside_R[start:stop, None]
        else:
            best_C, full_CN = log_CN.max(-1).indices, probs_CN  # max: argmax is slower on a CPU
        return TeacherChunk(probs_CN=probs_CN, full_CN=full_CN, best_C=best_C, entropy_C=entropy_C)

    def _survey(self, normed_CH: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = self._head.logits(normed_CH)
        best_C = logits_CV.max(-1).indices
        # The draft vocabulary is sorted: a binary search finds a token's draft index.
        place_C = torch.searchsorted(self._ids_N, best_C).clamp_max(self._ids_N.numel() - 1)
        known_C = self._ids_N[place_C] == best_C
        log_inside_C = logits_CV[:, self._ids_N].logsumexp(-1) - logits_CV.logsumexp(-1)
        return torch.where(known_C, place_C, OUTSIDE), log_inside_C.exp().clamp_max(1.0)
