"""A term of one's own in the place of the objective's: written as one function, differentiated by autograd.

For ideas. What proves worth it gets a closed form beside the others (`core.ops.distillation`), which keeps one tensor
of a chunk's logits where autograd keeps several. As there, gradients are made in the forward pass, chunk by chunk.

Shape letters: M supervised (slot, step) pairs grouped by step, C stacked pairs of one chunk, N draft vocabulary, H
draft hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.device import FusedOps
from torchspec.core.objectives.chunks import Chunk
from torchspec.core.objectives.distillation import Head, PairTerms, Supervision, distil
from torchspec.core.objectives.teacher import Teacher
from torchspec.core.objectives.vocabulary_teacher import VocabularyTeacher

OwnTerm = Callable[[Tensor, Tensor], Tensor]
"""(logits of the draft [C, N] in fp32 or fp64, the teacher's probabilities over the draft's vocabulary [C, N]) -> the
loss of each pair, [C]."""


def distil_by(
    term: OwnTerm, outputs: Sequence[Tensor], head: Head, supervision: Supervision, ops: FusedOps
) -> tuple[Tensor, PairTerms]:
    """As `distil`, with `term` for all the weighted ones: (sum over pairs of base * coverage * term, the pairs' terms).

    Nothing may be added to the logits (`head.extra_NX`). Raises ConfigError where ranks have a part of the vocabulary
    each, since `term` is given whole rows.
    """
    assert head.extra_NX is None
    if isinstance(supervision.teacher, VocabularyTeacher):
        problem = Problem(
            field="target.shard_logits",
            value="vocabulary",
            message="an objective of one's own needs the whole vocabulary of a row",
            remedy="target.shard_logits=tokens",
        )
        raise ConfigError([problem])
    with torch.no_grad():
        _, terms = distil(outputs, head, replace(supervision, weights={"cross_entropy": 1.0}), ops)
    loss: Tensor = _ByAutograd.apply(  # type: ignore[no-untyped-call]
        term, supervision, head.eps, torch.is_grad_enabled(), head.norm_H, head.head_NH, *outputs
    )
    return loss, terms


class _ByAutograd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, term: OwnTerm, supervision: Supervision, eps: float, with_grad: bool, *given: Tensor
    ) -> Tensor:
        wanted = [with_grad and needed for needed in ctx.needs_input_grad[4:]]
        grads = [torch.zeros_like(value) if want else None for value, want in zip(given, wanted, strict=True)]
        loss = supervision.base_M.new_zeros(())
        for chunk in supervision.chunks:
            if not chunk.teaches:
                continue
            with torch.enable_grad():
                leaves = [value.detach().requires_grad_(want) for value, want in zip(given, wanted, strict=True)]
                value = _of_chunk(term, supervision, eps, chunk, *leaves)
            loss += value.detach()
            trained = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(value, trained, materialize_grads=True) if trained else ())
            for grad in grads:
                if grad is not None:
                    grad += next(found)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the distillation loss is differentiable once: leave create_graph out")
        grads = [None if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors]
        return None, None, None, None, *grads


def _of_chunk(
    term: OwnTerm, supervision: Supervision, eps: float, chunk: Chunk, norm_H: Tensor, head_NH: Tensor, *outputs: Tensor
) -> Tensor:
    """The chunk's share of the sum."""
    teacher = supervision.teacher
    assert isinstance(teacher, Teacher)
    taught = teacher.chunk(chunk)
    places = list(zip(outputs, chunk.pairs, strict=True))
    raw_CH = torch.cat([output.index_select(0, supervision.slot_M[lo:hi]) for output, (lo, hi) in places])
    row_C = torch.cat([supervision.row_M[lo:hi] for _, (lo, hi) in places]) - chunk.start
    base_C = torch.cat([supervision.base_M[lo:hi] for _, (lo, hi) in places])
    normed_CH = F.rms_norm(raw_CH, norm_H.shape, norm_H, eps)
    value_C = term((normed_CH @ head_NH.T).to(base_C.dtype), taught.tile.probs_RN[row_C])
    return (base_C * taught.coverage_C[row_C] * value_C).sum()
