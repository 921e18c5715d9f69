"""Soft-target cross-entropy of an unrolled draft: gradients are made together with the loss, chunk by chunk.

The outer loop runs over chunks of target rows, the inner one over steps, so the teacher's product happens once per
row and serves every step; only one chunk's logits exist at a time. `eager` is the readable reference.

With z = h W^T in fp32 and q = softmax(z):  d(sum_m w_m CE_m)/dz = w (q - p),  dh = dz W,  dW = dz^T h.

Shape letters: M supervised (slot, step) pairs grouped by step, C pairs or rows of one chunk, R target rows,
H draft hidden size, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.objectives.chunks import Chunk
from torchspec.core.objectives.teacher import Teacher, TeacherChunk


@dataclass(frozen=True, kw_only=True)
class PairTerms:
    """Of each pair, without gradient: what the loss is made of and how well draft and target agree.

    cross_entropy_M, entropy_M    in nats; their difference is KL(p | q)
    alpha_M                       sum_v min(p_full, q)
    agree_M                       bool: the draft's first choice is the target's, among all V tokens
    """

    cross_entropy_M: Tensor
    entropy_M: Tensor
    alpha_M: Tensor
    agree_M: Tensor


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What the pairs are taught. `row_M` is each pair's target row, `weight_M` its weight in the sum."""

    teacher: Teacher
    chunks: Sequence[Chunk]
    row_M: Tensor
    weight_M: Tensor


def distil(hidden_MH: Tensor, head_NH: Tensor, supervision: Supervision, ops: FusedOps) -> tuple[Tensor, PairTerms]:
    """(sum_m weight_m * CE(p_m, q_m), the pairs' terms).

    `hidden_MH` are the draft's states after its final norm, `head_NH` its output head, both in the compute dtype;
    logits, softmax and sums are fp32 (fp64 for fp64). With M = 0 the sum is 0 and the gradients are zeros.
    Differentiable once, in `hidden_MH` and `head_NH`.
    """
    outputs: tuple[Tensor, ...] = _Distillation.apply(  # type: ignore[no-untyped-call]
        hidden_MH, head_NH, supervision, ops, torch.is_grad_enabled()
    )
    loss, cross_entropy_M, entropy_M, alpha_M, agree_M = outputs
    return loss, PairTerms(cross_entropy_M=cross_entropy_M, entropy_M=entropy_M, alpha_M=alpha_M, agree_M=agree_M)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MH: Tensor, head_NH: Tensor, supervision: Supervision, ops: FusedOps, with_grad: bool
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(hidden_MH.dtype, torch.float32)
        pairs = hidden_MH.shape[0]
        terms = PairTerms(
            cross_entropy_M=hidden_MH.new_zeros(pairs, dtype=wide),
            entropy_M=hidden_MH.new_zeros(pairs, dtype=wide),
            alpha_M=hidden_MH.new_zeros(pairs, dtype=wide),
            agree_M=hidden_MH.new_zeros(pairs, dtype=torch.bool),
        )
        tile = _Tile(hidden_MH, head_NH, supervision, terms, ops, with_grad)
        for chunk in supervision.chunks:
            target = supervision.teacher.chunk(chunk.start, chunk.stop)
            for lo, hi in chunk.pairs:
                if lo < hi:
                    tile.run(slice(lo, hi), supervision.row_M[lo:hi] - chunk.start, target)
        if with_grad:
            ctx.save_for_backward(tile.dhidden_MH, tile.dhead_NH.to(head_NH.dtype))
        values = (terms.cross_entropy_M, terms.entropy_M, terms.alpha_M, terms.agree_M)
        ctx.mark_non_differentiable(*values)
        return (terms.cross_entropy_M * supervision.weight_M).sum(), *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dhidden_MH, dhead_NH = ctx.saved_tensors
        return dhidden_MH * dloss.to(dhidden_MH.dtype), dhead_NH * dloss.to(dhead_NH.dtype), None, None, None


class _Tile:
    """The work on one (chunk, step): logits once, terms, and the gradients while the logits are still there."""

    def __init__(
        self,
        hidden_MH: Tensor,
        head_NH: Tensor,
        supervision: Supervision,
        terms: PairTerms,
        ops: FusedOps,
        with_grad: bool,
    ) -> None:
        self.hidden_MH, self.head_NH, self.weight_M = hidden_MH, head_NH, supervision.weight_M
        self.terms, self.ops, self.with_grad = terms, ops, with_grad
        # Laid out for the product; a CPU multiplies half as fast by the transposed view.
        self.head_HN = head_NH.T.contiguous()
        if with_grad:
            self.dhidden_MH = torch.zeros_like(hidden_MH)
            self.dhead_NH = torch.zeros_like(head_NH, dtype=supervision.weight_M.dtype)

    def run(self, pairs: slice, rows_C: Tensor, target: TeacherChunk) -> None:
        """`rows_C`: each pair's row within the chunk."""
        hidden_CH, terms = self.hidden_MH[pairs], self.terms
        probs_CN, full_CN = target.probs_CN, target.full_CN
        if rows_C.numel() < probs_CN.shape[0]:  # else every row of the chunk, in order
            probs_CN, full_CN = probs_CN[rows_C], full_CN[rows_C]
        logits_CN = self.ops.wide_mm(hidden_CH, self.head_HN)
        top_C, best_C = logits_CN.max(-1)
        expected_C = torch.linalg.vecdot(probs_CN, logits_CN)
        q_CN = torch.softmax(logits_CN, -1)
        # log sum exp(z) = z_top - log q_top, and q_top >= 1 / N cannot underflow.
        normaliser_C = top_C - q_CN.gather(1, best_C[:, None])[:, 0].log()
        terms.cross_entropy_M[pairs] = normaliser_C - expected_C
        terms.entropy_M[pairs] = target.entropy_C[rows_C]
        terms.agree_M[pairs] = best_C == target.best_C[rows_C]
        terms.alpha_M[pairs] = full_CN.minimum(q_CN).sum(-1)
        if self.with_grad:
            dlogits_CN = q_CN.sub_(probs_CN).mul_(self.weight_M[pairs, None]).to(hidden_CH.dtype)
            self.dhidden_MH[pairs] = dlogits_CN @ self.head_NH
            if self.dhead_NH.dtype == hidden_CH.dtype:
                self.dhead_NH.addmm_(dlogits_CN.T, hidden_CH)
            else:
                self.dhead_NH += self.ops.wide_mm(dlogits_CN.T, hidden_CH)
