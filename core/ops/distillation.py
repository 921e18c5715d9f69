"""What a draft's logits are worth against the target's distribution, and the gradient that replaces them.

One tile holds the logits of some (slot, step) pairs; every term and metric that needs them is computed here, and the
gradient is written over them, so that each logit is made, used and forgotten once. `core.objectives.eager` has the
same terms under autograd.

With z a row of logits, Z = log sum exp z, q = softmax(z), p the teacher normalised over the draft vocabulary, c its
mass there and f = c p (gradients with respect to z; 2602.23881 for the last two):

    cross_entropy   Z - p.z                         q - p
    reverse_kl      R = sum q log(q / p)            q (log(q / p) - R)
    jsd             (KL(p|m) + KL(q|m)) / 2         q (log(q / m) - KL(q|m)) / 2        m = (p + q) / 2
    tv              1 - alpha                       -q (1[q <= f] - sum of q where q <= f)
    lk_alpha        -log alpha                      that of tv / alpha                  alpha = sum min(f, q)
    a label         Z - z[label]                    q - onehot(label)

Shape letters: C pairs of the tile, R teacher rows, N draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchspec.core.ops.extremes import first_max
from torchspec.core.ops.slices import row_slices

SOFT_TERMS = ("cross_entropy", "reverse_kl", "jsd", "tv", "lk_alpha")
LOG_TERMS = frozenset({"reverse_kl", "jsd"})


@dataclass(frozen=True, kw_only=True)
class TileTeacher:
    """In the logits' own dtype.

    probs_RN        normalised over the draft vocabulary
    inside_R        the teacher's mass there; None if it is 1, the vocabulary being whole
    log_probs_RN    for the terms that need it (`LOG_TERMS`), else None
    """

    probs_RN: Tensor
    inside_R: Tensor | None = None
    log_probs_RN: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Label:
    """Cross-entropy to one token: its draft index and its weight; a negative index adds and teaches nothing."""

    weight_C: Tensor
    index_C: Tensor


@dataclass(frozen=True, kw_only=True)
class TilePairs:
    """Which teacher row teaches each logits row, and what the terms weigh.

    row_C       int64, on the device
    runs        the same for the host: (start, stop, row) says that rows start..stop-1 are taught by row, row + 1, ...
    weight      of each soft term wanted, [C]
    labels      label terms by name
    """

    row_C: Tensor
    runs: Sequence[tuple[int, int, int]]
    weight: Mapping[str, Tensor]
    labels: Mapping[str, Label] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TileTerms:
    """Of each pair: the term values by name (those asked for, cross_entropy always), alpha, and the index of the
    draft's first choice (the lowest of equals)."""

    value: dict[str, Tensor]
    alpha_C: Tensor
    best_C: Tensor


def distillation_tile(
    logits_CN: Tensor, teacher: TileTeacher, pairs: TilePairs, *, with_grad: bool, temporary_bytes: int
) -> TileTerms:
    """The pairs' terms; `logits_CN` (fp32 or fp64) holds d(sum of weight x term)/d logits afterwards.

    Without `with_grad` its contents are undefined afterwards. Works through slices of rows of which a temporary has
    about `temporary_bytes`.
    """
    pairs_count, size = logits_CN.shape
    names = ("cross_entropy", *(name for name in pairs.weight if name != "cross_entropy"), *pairs.labels)
    value = {name: logits_CN.new_empty(pairs_count) for name in names}
    alpha_C = logits_CN.new_empty(pairs_count)
    best_C = torch.empty(pairs_count, dtype=torch.int64, device=logits_CN.device)
    row_bytes = size * logits_CN.element_size()
    slices = _Slices(
        logits_CN, teacher, pairs, value, with_grad, min(pairs_count, max(1, temporary_bytes // row_bytes))
    )
    for start, stop, row in pairs.runs:
        for part in row_slices(start, stop, row_bytes, temporary_bytes):
            rows = slice(row + part.start - start, row + part.stop - start)
            best_C[part], alpha_C[part] = slices.run(part, rows)
    return TileTerms(value=value, alpha_C=alpha_C, best_C=best_C)


class _Slices:
    """Scratch space and the work on one slice of rows."""

    def __init__(
        self,
        logits_CN: Tensor,
        teacher: TileTeacher,
        pairs: TilePairs,
        value: dict[str, Tensor],
        with_grad: bool,
        most_rows: int,
    ) -> None:
        self.logits_CN, self.teacher, self.pairs, self.value = logits_CN, teacher, pairs, value
        self.with_grad = with_grad
        self.soft = set(pairs.weight) - {"cross_entropy"}
        self.scratch = logits_CN.new_empty(most_rows, logits_CN.shape[1])
        probs_RN, inside_R = teacher.probs_RN, teacher.inside_R
        # Once for all the steps that share a row.
        self.full_RN = probs_RN if inside_R is None else probs_RN * inside_R[:, None]

    def run(self, part: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """(index of the first choice, alpha) of the slice."""
        z = self.logits_CN[part]
        p, full = self.teacher.probs_RN[rows], self.full_RN[rows]
        top, best = first_max(z)
        expected = torch.linalg.vecdot(p, z)
        at_label = {name: _at(z, label.index_C[part]) for name, label in self.pairs.labels.items()}
        kept = z.clone() if self.soft & LOG_TERMS else None
        q = torch.softmax(z, -1, out=z)
        # Z = z_top - log q_top, and q_top >= 1 / N cannot underflow.
        normaliser = top - _at(q, best).log_()
        self.value["cross_entropy"][part] = normaliser - expected
        for name, label in self.pairs.labels.items():
            self.value[name][part] = (normaliser - at_label[name]).masked_fill_(label.index_C[part] < 0, 0.0)
        alpha = torch.minimum(full, q, out=self.scratch[: len(z)]).sum(-1)
        if self.soft:
            log_q = None if kept is None else kept.sub_(normaliser[:, None])
            self._soft_terms(q, log_q, p, part, rows, alpha)
        elif self.pairs.labels or "cross_entropy" not in self.pairs.weight:
            self._gradient(q, p, part, None)
        elif self.with_grad:
            q.sub_(p).mul_(self.pairs.weight["cross_entropy"][part, None])
        return best, alpha

    def _soft_terms(self, q: Tensor, log_q: Tensor | None, p: Tensor, part: slice, rows: slice, alpha: Tensor) -> None:
        weight, value = self.pairs.weight, self.value
        total = torch.zeros_like(q)
        if "tv" in weight or "lk_alpha" in weight:
            kept = q.masked_fill(q > self.full_RN[rows], 0.0)
            share = torch.zeros_like(alpha)
            if "tv" in weight:
                value["tv"][part] = 1 - alpha
                share += weight["tv"][part]
            if "lk_alpha" in weight:
                limits = torch.finfo(alpha.dtype)
                floor = alpha.clamp_min(limits.tiny)
                value["lk_alpha"][part] = -floor.log()
                # An infinite slope would turn the zeros that it multiplies into NaN.
                share += (weight["lk_alpha"][part] / floor).clamp_max_(limits.max)
            total += (q * kept.sum(-1, keepdim=True) - kept) * share[:, None]
        if log_q is not None:
            assert self.teacher.log_probs_RN is not None
            log_p = self.teacher.log_probs_RN[rows]
            if "reverse_kl" in weight:
                total += _reverse(q, log_q - log_p, weight["reverse_kl"][part], value["reverse_kl"][part])
            if "jsd" in weight:
                log_m = torch.logaddexp(log_q, log_p) - math.log(2)
                towards_m = torch.zeros_like(alpha)
                total += _reverse(q, log_q - log_m, 0.5 * weight["jsd"][part], towards_m)
                value["jsd"][part] = 0.5 * (towards_m + (p * (log_p - log_m)).nan_to_num_(nan=0.0).sum(-1))
        self._gradient(q, p, part, total)

    def _gradient(self, q: Tensor, p: Tensor, part: slice, soft: Tensor | None) -> None:
        """The gradient of everything over q: `soft` has the terms other than cross-entropy and labels."""
        if not self.with_grad:
            return
        cross = self.pairs.weight.get("cross_entropy")
        share = q.new_zeros(len(q)) if cross is None else cross[part].clone()
        dense = torch.zeros_like(q) if cross is None else p * cross[part, None]
        for label in self.pairs.labels.values():
            index = label.index_C[part]
            taught = label.weight_C[part].masked_fill(index < 0, 0.0)
            share += taught
            dense.scatter_add_(1, index.clamp_min(0)[:, None], taught[:, None])
        q.mul_(share[:, None]).sub_(dense)
        if soft is not None:
            q.add_(soft)


def _at(x_CN: Tensor, index_C: Tensor) -> Tensor:
    return x_CN.gather(1, index_C.clamp_min(0)[:, None])[:, 0]


def _reverse(q: Tensor, log_ratio: Tensor, weight: Tensor, value: Tensor) -> Tensor:
    """Gradient of weight x KL(q | r) with log_ratio = log(q / r); the divergence goes into `value`."""
    product = q * log_ratio
    value.copy_(product.sum(-1))
    return (product - q * value[:, None]).mul_(weight[:, None])
