"""The loss of an unrolled draft on its target's distributions: one pass makes terms, metrics and gradients.

The loop runs over chunks of target rows. The teacher's product happens once per row and serves every step; the logits
of all steps that a chunk teaches are one product, live in one buffer, and are overwritten by their gradient. The
draft's final norm belongs to the pass too, so that of each pair only the layer's output and its gradient are kept.
`eager` is the readable reference of the terms, `core.ops.distillation` their closed form.

With z = n W^T, n the normed output, and g = d(loss)/dz:  dn = g W,  dW = g^T n.

Shape letters: M supervised (slot, step) pairs grouped by step, C stacked pairs of one chunk, S slots, H draft hidden
size, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.objectives.chunks import Chunk, SharedChunk
from torchspec.core.objectives.teacher import OUTSIDE, Teacher
from torchspec.core.objectives.vocabulary_teacher import OwnPairs, Taught, VocabularyTeacher
from torchspec.core.objectives.weighting import weigh
from torchspec.core.ops.distillation import TilePairs

TERMS = ("cross_entropy", "kl", "reverse_kl", "jsd", "tv", "lk_alpha", "argmax", "ground_truth")
LABEL_TERMS = frozenset({"argmax", "ground_truth"})


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What the pairs are taught.

    slot_M, row_M    each pair's row in its step's outputs, and its target row
    base_M           its weight before the target row's coverage
    weights          of the loss's terms, by the names in `TERMS`
    truth_M          draft index of the token that came, OUTSIDE if the draft cannot say it; for `ground_truth`
    """

    teacher: Teacher | VocabularyTeacher
    chunks: Sequence[Chunk]
    slot_M: Tensor
    row_M: Tensor
    base_M: Tensor
    weights: Mapping[str, float] = field(default_factory=lambda: {"cross_entropy": 1.0})
    truth_M: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Head:
    """The draft's final norm and output head, in the compute dtype."""

    norm_H: Tensor
    head_NH: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class PairTerms:
    """Of each pair, without gradient: what the loss is made of and how well draft and target agree.

    cross_entropy_M, entropy_M    in nats; their difference is KL(p | q)
    alpha_M                       sum_v min(p_full, q)
    agree_M                       bool: the draft's first choice is the target's, among all V tokens
    coverage_M                    how much the pair's target row counts
    """

    cross_entropy_M: Tensor
    entropy_M: Tensor
    alpha_M: Tensor
    agree_M: Tensor
    coverage_M: Tensor


def distil(outputs: Sequence[Tensor], head: Head, supervision: Supervision, ops: FusedOps) -> tuple[Tensor, PairTerms]:
    """(sum over pairs and terms of base * coverage * weight * term, the pairs' terms).

    `outputs[k]` [S, H] are the layer's outputs of step k before the final norm; logits, softmax and sums are fp32
    (fp64 for fp64). Without pairs the sum is 0 and the gradients are zeros. Differentiable once.

    Where ranks share the target's head this is a collective, and the sum is over this rank's pairs. A
    `VocabularyTeacher` leaves in the gradient of the draft's head all ranks' pairs, in this rank's rows of it, and
    zeros in the others: added over the ranks it is the gradient of the added sums, if all are scaled alike.
    """
    results: tuple[Tensor, ...] = _Distillation.apply(  # type: ignore[no-untyped-call]
        supervision, ops, head.eps, torch.is_grad_enabled(), head.norm_H, head.head_NH, *outputs
    )
    loss, cross_entropy_M, entropy_M, alpha_M, agree_M, coverage_M = results
    terms = PairTerms(
        cross_entropy_M=cross_entropy_M,
        entropy_M=entropy_M,
        alpha_M=alpha_M,
        agree_M=agree_M,
        coverage_M=coverage_M,
    )
    return loss, terms


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        supervision: Supervision,
        ops: FusedOps,
        eps: float,
        with_grad: bool,
        norm_H: Tensor,
        head_NH: Tensor,
        *outputs: Tensor,
    ) -> tuple[Tensor, ...]:
        head = Head(norm_H=norm_H, head_NH=head_NH, eps=eps)
        run = _Pass(head, outputs, supervision, ops, with_grad)
        for chunk in supervision.chunks:
            run.add(chunk)
        if with_grad:
            ctx.save_for_backward(run.dnorm_H.to(norm_H.dtype), run.whole_dhead(), *run.doutputs)
        terms = run.terms
        values = (terms.cross_entropy_M, terms.entropy_M, terms.alpha_M, terms.agree_M, terms.coverage_M)
        ctx.mark_non_differentiable(*values)
        return run.loss, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Out of place: the graph may be asked again.
        return None, None, None, None, *(grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors)


class _Pass:
    """Buffers of one pass, and the work on one chunk."""

    def __init__(
        self, head: Head, outputs: Sequence[Tensor], supervision: Supervision, ops: FusedOps, with_grad: bool
    ) -> None:
        self.head, self.outputs, self.supervision, self.ops, self.with_grad = head, outputs, supervision, ops, with_grad
        wide, device = supervision.base_M.dtype, head.norm_H.device
        pairs, most = supervision.base_M.numel(), max((chunk.count for chunk in supervision.chunks), default=0)
        self.terms = PairTerms(
            cross_entropy_M=torch.empty(pairs, dtype=wide, device=device),
            entropy_M=torch.empty(pairs, dtype=wide, device=device),
            alpha_M=torch.empty(pairs, dtype=wide, device=device),
            agree_M=torch.empty(pairs, dtype=torch.bool, device=device),
            coverage_M=torch.empty(pairs, dtype=wide, device=device),
        )
        self.loss = torch.zeros((), dtype=wide, device=device)
        teacher = supervision.teacher
        self.columns = teacher.columns if isinstance(teacher, VocabularyTeacher) else slice(None)
        self.head_NH = head.head_NH[self.columns]
        self.wide_HN = ops.wide_operand(self.head_NH).T
        if not isinstance(teacher, VocabularyTeacher):
            self.logits = torch.empty(most, len(self.head_NH), dtype=wide, device=device)
        self.raw = head.norm_H.new_empty(most, head.norm_H.shape[0])
        if with_grad:
            self.doutputs = [torch.zeros_like(output) for output in outputs]
            self.dnorm_H = torch.zeros_like(head.norm_H, dtype=wide)
            self.dhead_NH = torch.zeros_like(self.head_NH, dtype=wide)

    def whole_dhead(self) -> Tensor:
        """The gradient of the head: zeros in the rows that are other ranks' part."""
        own_NH = self.dhead_NH.to(self.head.head_NH.dtype)
        if len(own_NH) == len(self.head.head_NH):
            return own_NH
        whole_NH = torch.zeros_like(self.head.head_NH)
        whole_NH[self.columns] = own_NH
        return whole_NH

    def add(self, chunk: Chunk) -> None:
        if not chunk.teaches:
            return
        raw_CH = self.raw[: chunk.count]
        for output, (lo, hi), place in self._steps(chunk):
            torch.index_select(output, 0, self.supervision.slot_M[lo:hi], out=raw_CH[place])
        normed_CH, kept = self.ops.rms_norm(raw_CH, self.head.norm_H, self.head.eps)
        teacher = self.supervision.teacher
        if isinstance(teacher, VocabularyTeacher):
            taught = self._with_others(teacher, chunk, normed_CH)
        else:
            taught = self._alone(teacher, chunk, normed_CH)
        self._keep(chunk, taught)
        if taught.dnormed_CH is None:
            return
        draw_CH, dnorm_H = self.ops.rms_norm_backward(taught.dnormed_CH, raw_CH, self.head.norm_H, kept)
        self.dnorm_H += dnorm_H
        for doutput, (_, (lo, hi), place) in zip(self.doutputs, self._steps(chunk), strict=True):
            doutput.index_copy_(0, self.supervision.slot_M[lo:hi], draw_CH[place])

    def _alone(self, teacher: Teacher, chunk: Chunk, normed_CH: Tensor) -> Taught:
        sup, target = self.supervision, teacher.chunk(chunk)
        row_C = self._stacked(sup.row_M, chunk) - chunk.start
        coverage_C, entropy_C, best_C = target.coverage_C[row_C], target.entropy_C[row_C], target.best_C[row_C]
        argmax_C = target.tile.probs_RN.max(-1).indices[row_C] if "argmax" in sup.weights else None
        truth_C = None if sup.truth_M is None else self._stacked(sup.truth_M, chunk)
        soft, labels = weigh(sup.weights, self._stacked(sup.base_M, chunk) * coverage_C, argmax_C, truth_C)
        logits_CN = self.ops.wide_mm(normed_CH, self.wide_HN, out=self.logits[: chunk.count])
        pairs = TilePairs(row_C=row_C, runs=chunk.runs, weight=soft, labels=labels)
        found = self.ops.distillation_tile(logits_CN, target.tile, pairs, with_grad=self.with_grad)
        dnormed_CH = None
        if self.with_grad:
            dlogits_CN = logits_CN.to(normed_CH.dtype)
            if self.dhead_NH.dtype == dlogits_CN.dtype:
                self.dhead_NH.addmm_(dlogits_CN.T, normed_CH)
            else:
                self.dhead_NH += self.ops.wide_mm(dlogits_CN.T, normed_CH)
            dnormed_CH = dlogits_CN @ self.head_NH
        return Taught(
            value=found.value | {"alpha": found.alpha_C},
            entropy_C=entropy_C,
            coverage_C=coverage_C,
            agree_C=(found.best_C == best_C) & (best_C != OUTSIDE),
            dnormed_CH=dnormed_CH,
        )

    def _with_others(self, teacher: VocabularyTeacher, chunk: Chunk, normed_CH: Tensor) -> Taught:
        assert isinstance(chunk, SharedChunk)
        sup = self.supervision
        row_C = self._stacked(sup.row_M, chunk) - chunk.start
        pairs = OwnPairs(
            normed_CH=normed_CH,
            row_C=row_C,
            base_C=self._stacked(sup.base_M, chunk),
            truth_C=torch.full_like(row_C, OUTSIDE) if sup.truth_M is None else self._stacked(sup.truth_M, chunk),
        )
        dhead_NH = self.dhead_NH if self.with_grad else None
        return teacher.teach(chunk, pairs, sup.weights, self.wide_HN, self.head_NH, dhead_NH)

    def _keep(self, chunk: Chunk, taught: Taught) -> None:
        weight_C = self._stacked(self.supervision.base_M, chunk) * taught.coverage_C
        cross_C = taught.value["cross_entropy"]
        for name, weight in self.supervision.weights.items():
            value_C = cross_C - taught.entropy_C if name == "kl" else taught.value[name]
            self.loss += weight * torch.dot(weight_C, value_C)
        terms = self.terms
        for _, (lo, hi), place in self._steps(chunk):
            terms.cross_entropy_M[lo:hi] = cross_C[place]
            terms.entropy_M[lo:hi] = taught.entropy_C[place]
            terms.alpha_M[lo:hi] = taught.value["alpha"][place]
            terms.agree_M[lo:hi] = taught.agree_C[place]
            terms.coverage_M[lo:hi] = taught.coverage_C[place]

    def _steps(self, chunk: Chunk) -> Iterator[tuple[Tensor, tuple[int, int], slice]]:
        """Each step's outputs, its range of the M, and its place in the stack."""
        first = 0
        for output, (lo, hi) in zip(self.outputs, chunk.pairs, strict=True):
            yield output, (lo, hi), slice(first, first + hi - lo)
            first += hi - lo

    def _stacked(self, value_M: Tensor, chunk: Chunk) -> Tensor:
        return torch.cat([value_M[lo:hi] for lo, hi in chunk.pairs])
