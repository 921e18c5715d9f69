"""The loss of an unrolled draft on its target's distributions: one pass makes terms, metrics and gradients.

The loop runs over chunks of target rows. The teacher's product happens once per row and serves every step; the logits
of all steps that a chunk teaches are one product, live in one buffer, and are overwritten by their gradient. The
draft's final norm belongs to the pass too, so that of each pair only the layer's output and its gradient are kept.
`eager` is the readable reference of the terms, `core.ops.distillation` their closed form.

With z = n W^T + f E^T, n the normed output, f what a draft adds to its logits (a Markov or GRU correction; mostly
nothing), and g = d(loss)/dz:  dn = g W,  dW = g^T n,  df = g E,  dE = g^T f.

Shape letters: M supervised (slot, step) pairs grouped by step, C stacked pairs of one chunk, S slots, H draft hidden
size, N draft vocabulary, X width of what is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.objectives.chunks import Chunk, SharedChunk
from torchspec.core.objectives.teacher import OUTSIDE, Teacher
from torchspec.core.objectives.vocabulary_teacher import (
    OwnHeads,
    OwnPairs,
    Taught,
    VocabularyTeacher,
    add_mapped,
)
from torchspec.core.objectives.weighting import weigh
from torchspec.core.ops.distillation import TilePairs
from torchspec.core.ops.maps import add_product

TERMS = ("cross_entropy", "kl", "reverse_kl", "jsd", "tv", "lk_alpha", "argmax", "ground_truth")
LABEL_TERMS = frozenset({"argmax", "ground_truth"})


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What the pairs are taught.

    slot_M, row_M    each pair's row in its step's outputs, and its target row
    base_M           its weight before the target row's coverage
    weights          of the loss's terms, by the names in `TERMS`: of all pairs, or of each, [M]
    truth_M          draft index of the token that came, OUTSIDE if the draft cannot say it; for `ground_truth`
    """

    teacher: Teacher | VocabularyTeacher
    chunks: Sequence[Chunk]
    slot_M: Tensor
    row_M: Tensor
    base_M: Tensor
    weights: Mapping[str, float | Tensor] = field(default_factory=lambda: {"cross_entropy": 1.0})
    truth_M: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Head:
    """The draft's final norm and output head, in the compute dtype; what of it wants no gradient gets none.

    extra_NX    the map E of what is added to the logits
    is_part     `head_NH` holds the rows of a `VocabularyTeacher`'s part alone (a target's head that ranks share)
    """

    norm_H: Tensor
    head_NH: Tensor
    eps: float
    extra_NX: Tensor | None = None
    is_part: bool = False


@dataclass(frozen=True)
class PairTerms:
    """Of each pair, without gradient: what the loss is made of and how well draft and target agree.

    cross_entropy_M, entropy_M    in nats; their difference is KL(p | q)
    alpha_M                       sum_v min(p_full, q)
    agree_M                       bool: the draft's first choice is the target's, among all V tokens
    coverage_M                    how much the pair's target row counts
    truth_M                       -log q of the token that came, 0 if the draft cannot say it; where `ground_truth` is
                                  among the weights
    """

    cross_entropy_M: Tensor
    entropy_M: Tensor
    alpha_M: Tensor
    agree_M: Tensor
    coverage_M: Tensor
    truth_M: Tensor | None = None


def distil(
    outputs: Sequence[Tensor],
    head: Head,
    supervision: Supervision,
    ops: FusedOps,
    extras: Sequence[Tensor] | None = None,
) -> tuple[Tensor, PairTerms]:
    """(sum over pairs and terms of base * coverage * weight * term, the pairs' terms).

    `outputs[k]` [S, H] are the layer's outputs of step k before the final norm, `extras[k]` [S, X] what
    `head.extra_NX` maps to something added to their logits; logits, softmax and sums are fp32 (fp64 for fp64). Without
    pairs the sum is 0 and the gradients are zeros. Differentiable once.

    Where ranks share the target's head this is a collective, and the sum is over this rank's pairs. A
    `VocabularyTeacher` leaves in the gradient of the draft's head all ranks' pairs, in this rank's rows of it, and
    zeros in the others: added over the ranks it is the gradient of the added sums, if all are scaled alike.
    """
    assert (head.extra_NX is None) == (extras is None), "what is added needs its map, and the map something to add"
    loss, *values = _Distillation.apply(  # type: ignore[no-untyped-call]
        supervision, ops, head, torch.is_grad_enabled(), head.norm_H, head.head_NH, head.extra_NX,
        *outputs, *(extras or ()),
    )  # fmt: skip
    return loss, PairTerms(*values)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        supervision: Supervision,
        ops: FusedOps,
        head: Head,
        with_grad: bool,
        norm_H: Tensor,
        head_NH: Tensor,
        extra_NX: Tensor | None,
        *outputs_extras: Tensor,
    ) -> tuple[Tensor | None, ...]:
        steps = len(outputs_extras) if extra_NX is None else len(outputs_extras) // 2
        given = replace(head, norm_H=norm_H, head_NH=head_NH, extra_NX=extra_NX)
        run = _Pass(
            given, outputs_extras[:steps], outputs_extras[steps:], supervision, ops, with_grad, ctx.needs_input_grad[5]
        )
        for chunk in supervision.chunks:
            run.add(chunk)
        if with_grad:
            dhead_NH, dextra_NX = run.whole_dheads()
            # None takes no place among what is saved.
            ctx.kept = (dhead_NH is not None, dextra_NX is not None)
            grads = (run.dnorm_H.to(norm_H.dtype), dhead_NH, dextra_NX, *run.doutputs, *run.dextras)
            ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        values = astuple_of(run.terms)
        ctx.mark_non_differentiable(*(value for value in values if value is not None))
        return run.loss, *values

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients were made in the forward pass: nothing that is saved has a graph to refuse later (`ops.once`).
        if torch.is_grad_enabled():
            raise RuntimeError("the distillation loss is differentiable once: leave create_graph out")
        # Out of place: the graph may be asked again.
        grads = iter([grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors])
        dnorm_H = next(grads)
        dheads = [next(grads) if kept else None for kept in ctx.kept]
        return None, None, None, None, dnorm_H, *dheads, *grads


def astuple_of(terms: PairTerms) -> tuple[Tensor | None, ...]:
    """In the order of its fields, without the copies that `dataclasses.astuple` makes."""
    return tuple(getattr(terms, each.name) for each in fields(terms))


class _Pass:
    """Buffers of one pass, and the work on one chunk."""

    def __init__(
        self,
        head: Head,
        outputs: Sequence[Tensor],
        extras: Sequence[Tensor],
        supervision: Supervision,
        ops: FusedOps,
        with_grad: bool,
        trains_head: bool,
    ) -> None:
        self.head, self.outputs, self.extras = head, outputs, extras
        self.supervision, self.ops, self.with_grad = supervision, ops, with_grad
        wide, device = supervision.base_M.dtype, head.norm_H.device
        pairs, most = supervision.base_M.numel(), max((chunk.count for chunk in supervision.chunks), default=0)
        self.terms = PairTerms(
            cross_entropy_M=torch.empty(pairs, dtype=wide, device=device),
            entropy_M=torch.empty(pairs, dtype=wide, device=device),
            alpha_M=torch.empty(pairs, dtype=wide, device=device),
            agree_M=torch.empty(pairs, dtype=torch.bool, device=device),
            coverage_M=torch.empty(pairs, dtype=wide, device=device),
            truth_M=torch.empty(pairs, dtype=wide, device=device) if "ground_truth" in supervision.weights else None,
        )
        self.loss = torch.zeros((), dtype=wide, device=device)
        teacher = supervision.teacher
        self.columns = teacher.columns if isinstance(teacher, VocabularyTeacher) else slice(None)
        # Itself where it is not cut: what is made of a frozen head goes by the tensor.
        cut = not head.is_part and self.columns != slice(None)
        self.head_NH = head.head_NH[self.columns] if cut else head.head_NH
        self.extra_NX = None if head.extra_NX is None else head.extra_NX[self.columns]
        self.products = ops.maps.head(self.head_NH, ops, frozen=not head.head_NH.requires_grad)
        self.wide_XN = None if self.extra_NX is None else ops.wide_operand(self.extra_NX).T
        if not isinstance(teacher, VocabularyTeacher):
            self.logits = self.products.room(most, wide)
        self.raw = head.norm_H.new_empty(most, head.norm_H.shape[0])
        self.dhead_NH: Tensor | None = None
        self.dextra_NX: Tensor | None = None
        if with_grad:
            self.doutputs = [torch.zeros_like(output) for output in outputs]
            self.dextras = [torch.zeros_like(extra) for extra in extras]
            self.dnorm_H = torch.zeros_like(head.norm_H, dtype=wide)
            if trains_head:
                self.dhead_NH = torch.zeros_like(self.head_NH, dtype=wide)
            if self.extra_NX is not None:
                self.dextra_NX = torch.zeros_like(self.extra_NX, dtype=wide)

    def whole_dheads(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the head and of the map beside it: zeros in the rows that are other ranks' part."""
        return self._whole(self.dhead_NH, self.head.head_NH), self._whole(self.dextra_NX, self.head.extra_NX)

    def _whole(self, own: Tensor | None, like: Tensor | None) -> Tensor | None:
        if own is None or like is None:
            return None
        own = own.to(like.dtype)
        if len(own) == len(like):
            return own
        whole = torch.zeros_like(like)
        whole[self.columns] = own
        return whole

    def add(self, chunk: Chunk) -> None:
        if not chunk.teaches:
            return
        raw_CH = self.raw[: chunk.count]
        for output, (lo, hi), place in self._steps(chunk):
            torch.index_select(output, 0, self.supervision.slot_M[lo:hi], out=raw_CH[place])
        normed_CH, kept = self.ops.rms_norm(raw_CH, self.head.norm_H, self.head.eps)
        extra_CX = self._gathered(self.extras, chunk) if self.extras else None
        teacher = self.supervision.teacher
        if isinstance(teacher, VocabularyTeacher):
            taught = self._with_others(teacher, chunk, normed_CH, extra_CX)
        else:
            taught = self._alone(teacher, chunk, normed_CH, extra_CX)
        self._keep(chunk, taught)
        if taught.dnormed_CH is None:
            return
        if taught.dextra_CX is not None:
            for dextra, (_, (lo, hi), place) in zip(self.dextras, self._steps(chunk), strict=True):
                dextra.index_copy_(0, self.supervision.slot_M[lo:hi], taught.dextra_CX[place].to(dextra.dtype))
        draw_CH, dnorm_H = self.ops.rms_norm_backward(taught.dnormed_CH, raw_CH, self.head.norm_H, kept)
        self.dnorm_H += dnorm_H
        for doutput, (_, (lo, hi), place) in zip(self.doutputs, self._steps(chunk), strict=True):
            doutput.index_copy_(0, self.supervision.slot_M[lo:hi], draw_CH[place])

    def _gathered(self, values: Sequence[Tensor], chunk: Chunk) -> Tensor:
        """The pairs' rows of each step's values, stacked."""
        parts = [
            value.index_select(0, self.supervision.slot_M[lo:hi])
            for value, (lo, hi) in zip(values, chunk.pairs, strict=True)
        ]
        return torch.cat(parts)

    def _alone(self, teacher: Teacher, chunk: Chunk, normed_CH: Tensor, extra_CX: Tensor | None) -> Taught:
        sup, target = self.supervision, teacher.chunk(chunk)
        row_C = self._stacked(sup.row_M, chunk) - chunk.start
        coverage_C, entropy_C, best_C = target.coverage_C[row_C], target.entropy_C[row_C], target.best_C[row_C]
        argmax_C = target.tile.probs_RN.max(-1).indices[row_C] if "argmax" in sup.weights else None
        truth_C = None if sup.truth_M is None else self._stacked(sup.truth_M, chunk)
        base_C = self._stacked(sup.base_M, chunk)
        soft, labels = weigh(self._weights(chunk), base_C * coverage_C, argmax_C, truth_C)
        logits_CN = self.products.logits(normed_CH, out=None if self.logits is None else self.logits[: chunk.count])
        if extra_CX is not None:
            assert self.wide_XN is not None
            add_mapped(logits_CN, extra_CX, self.wide_XN, self.ops)
        pairs = TilePairs(row_C=row_C, runs=chunk.runs, weight=soft, labels=labels)
        found = self.ops.distillation_tile(logits_CN, target.tile, pairs, with_grad=self.with_grad)
        dnormed_CH = dextra_CX = None
        if self.with_grad:
            dlogits_CN = self.products.narrowed(logits_CN, normed_CH)
            dnormed_CH = self.products.backward(dlogits_CN, normed_CH, self.dhead_NH)
            if extra_CX is not None:
                assert self.extra_NX is not None
                dlogits_CN = dlogits_CN.to(extra_CX.dtype)
                add_product(self.dextra_NX, dlogits_CN, extra_CX, self.ops)
                dextra_CX = dlogits_CN @ self.extra_NX
        return Taught(
            value=found.value | {"alpha": found.alpha_C},
            entropy_C=entropy_C,
            coverage_C=coverage_C,
            agree_C=(found.best_C == best_C) & (best_C != OUTSIDE),
            dnormed_CH=dnormed_CH,
            dextra_CX=dextra_CX,
        )

    def _with_others(
        self, teacher: VocabularyTeacher, chunk: Chunk, normed_CH: Tensor, extra_CX: Tensor | None
    ) -> Taught:
        assert isinstance(chunk, SharedChunk)
        sup = self.supervision
        row_C = self._stacked(sup.row_M, chunk) - chunk.start
        pairs = OwnPairs(
            normed_CH=normed_CH,
            extra_CX=extra_CX,
            row_C=row_C,
            base_C=self._stacked(sup.base_M, chunk),
            truth_C=torch.full_like(row_C, OUTSIDE) if sup.truth_M is None else self._stacked(sup.truth_M, chunk),
        )
        heads = OwnHeads(
            products=self.products,
            dhead_NH=self.dhead_NH,
            extra_NX=self.extra_NX,
            wide_XN=self.wide_XN,
            dextra_NX=self.dextra_NX,
        )
        return teacher.teach(chunk, pairs, self._weights(chunk), heads, with_grad=self.with_grad)

    def _weights(self, chunk: Chunk) -> dict[str, float | Tensor]:
        """Those of the chunk's pairs."""
        weights = self.supervision.weights
        return {name: self._stacked(w, chunk) if isinstance(w, Tensor) else w for name, w in weights.items()}

    def _keep(self, chunk: Chunk, taught: Taught) -> None:
        weight_C = self._stacked(self.supervision.base_M, chunk) * taught.coverage_C
        cross_C = taught.value["cross_entropy"]
        for name, weight in self._weights(chunk).items():
            value_C = cross_C - taught.entropy_C if name == "kl" else taught.value[name]
            self.loss += torch.dot(weight * weight_C, value_C)
        terms = self.terms
        for _, (lo, hi), place in self._steps(chunk):
            terms.cross_entropy_M[lo:hi] = cross_C[place]
            terms.entropy_M[lo:hi] = taught.entropy_C[place]
            terms.alpha_M[lo:hi] = taught.value["alpha"][place]
            terms.agree_M[lo:hi] = taught.agree_C[place]
            terms.coverage_M[lo:hi] = taught.coverage_C[place]
            if terms.truth_M is not None:
                terms.truth_M[lo:hi] = taught.value["ground_truth"][place]

    def _steps(self, chunk: Chunk) -> Iterator[tuple[Tensor, tuple[int, int], slice]]:
        """Each step's outputs, its range of the M, and its place in the stack."""
        first = 0
        for output, (lo, hi) in zip(self.outputs, chunk.pairs, strict=True):
            yield output, (lo, hi), slice(first, first + hi - lo)
            first += hi - lo

    def _stacked(self, value_M: Tensor, chunk: Chunk) -> Tensor:
        return torch.cat([value_M[lo:hi] for lo, hi in chunk.pairs])
