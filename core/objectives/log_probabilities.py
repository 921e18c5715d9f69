"""Log-probabilities of tokens and the entropy of their distributions, for losses of a policy that a draft is trained
beside: one pass for both, over a vocabulary in one piece or divided over ranks.

Nothing of the logits' size is kept beside the logits, and those are never written to: the backward pass makes the
probabilities again from three numbers a token, in a buffer of its own. `hidden_log_probabilities` makes the logits too,
chunk by chunk, and never has all of them. Formulas: `core.objectives.token_statistics`.

Where ranks share the vocabulary, every rank is given the same tokens and gets the same outputs. The forward pass is one
collective, whatever the number of tokens; the backward pass from logits needs none, that from hidden states one for
each chunk. Each rank is to differentiate the same loss of the outputs, and gets the gradient of that one loss, not of
the ranks' sum.

Shape letters: N tokens, K of them that count, C of a chunk, V vocabulary (with ranks: this one's part), H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.objectives.chunks import FEWEST_ROWS, token_spans
from torchspec.core.objectives.token_part import Request, TokenPart, told, wide
from torchspec.core.objectives.token_statistics import Whole, write_gradient
from torchspec.core.ops.maps import add_product
from torchspec.core.ops.once import Gradients, once_differentiable
from torchspec.core.parallel.vocabulary import summed

IGNORED = -100
"""torch's value for a token that does not count."""


@dataclass(frozen=True, kw_only=True)
class LogProbabilities:
    """In nats, fp32 (fp64 for fp64); 0 for tokens that do not count. `entropy_N` is None if it was not asked for."""

    log_probability_N: Tensor
    entropy_N: Tensor | None


def token_log_probabilities(
    logits_NV: Tensor,
    tokens_N: Tensor,
    ops: FusedOps,
    *,
    shards: VocabularyShards | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    ignore_index: int = IGNORED,
) -> LogProbabilities:
    """log softmax(logits / temperature) at the tokens, and the entropy of that softmax.

    ops           of the device that the tensors are on; temporaries are of about its `temporary_bytes`
    shards        `logits_NV` are this rank's part of the vocabulary, `tokens_N` every rank's, numbered over all of it
    ignore_index  a token of this value gets zeros, and its logits, whatever they are, a gradient of zeros

    Differentiable once with respect to the logits; their gradient has their dtype. To look at the tokens, the host
    waits for the device. Raises, before any collective, TypeError with every argument that is no tensor with numbers in
    it or else of another kind than it must be, and ValueError with all that is wrong with their values.
    """
    request = Request.of(
        {"logits": logits_NV, "tokens": tokens_N},
        ops,
        shards=shards,
        entropy=entropy,
        temperature=temperature,
        ignore_index=ignore_index,
    )
    columns = logits_NV.shape[-1] if logits_NV.dim() else 0
    _refuse(request.problems(logits_NV, "logits", tokens_N, columns))
    part = TokenPart.of(tokens_N, columns, request)
    return _answer(part, _OfLogits.apply(part, logits_NV))  # type: ignore[no-untyped-call]


def hidden_log_probabilities(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    tokens_N: Tensor,
    ops: FusedOps,
    *,
    bias_V: Tensor | None = None,
    shards: VocabularyShards | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    ignore_index: int = IGNORED,
    budget: int | None = None,
) -> LogProbabilities:
    """As `token_log_probabilities` of hidden @ weight^T + bias, which is never there as a whole.

    ops      as there; products are summed in fp32, by its `wide_mm`
    shards   `weight_VH` and `bias_V` are this rank's part of the vocabulary, `hidden_NH` and `tokens_N` every rank's
    budget   bytes for the logits of a chunk, the ops' `loss_bytes` by default; 128 tokens or more are worked on
             together whatever they take (up to 255 where the budget has no room for 256)

    The gradient of hidden is the whole one on every rank, those of weight and bias are this rank's part; they are
    summed in fp32 and have their tensor's dtype. What wants no gradient, which is to be the same on every rank, and
    tokens that do not count cost nothing. Differentiable once; waits and raises as the form above.
    """
    request = Request.of(
        {"hidden": hidden_NH, "weight": weight_VH, "tokens": tokens_N, **({} if bias_V is None else {"bias": bias_V})},
        ops,
        shards=shards,
        entropy=entropy,
        temperature=temperature,
        ignore_index=ignore_index,
        budget=budget,
    )
    columns = len(weight_VH) if weight_VH.dim() else 0
    wrong = [*request.problems(hidden_NH, "hidden", tokens_N, columns), *_misfits(hidden_NH, weight_VH, bias_V)]
    if budget is not None and budget < 1:
        wrong.append(f"a budget is 1 byte or more, not {budget}")
    _refuse(wrong)
    part = TokenPart.of(tokens_N, columns, request)
    hidden_KH = hidden_NH if part.rows_K is None else hidden_NH.index_select(0, part.rows_K)
    spans = _spans(hidden_KH, columns, ops.loss_bytes if budget is None else budget)
    return _answer(part, _OfHidden.apply(part, ops, spans, hidden_KH, weight_VH, bias_V))  # type: ignore[no-untyped-call]


def _misfits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Iterator[str]:
    if weight_VH.dim() != 2 or weight_VH.shape[-1:] != hidden_NH.shape[-1:] or not _alike(weight_VH, hidden_NH):
        yield f"weight is a matrix of hidden's width, dtype and device ({told(hidden_NH)}), not {told(weight_VH)}"
    if bias_V is not None and (bias_V.shape != weight_VH.shape[:1] or not _alike(bias_V, weight_VH)):
        yield f"bias has an entry for each row of weight ({told(weight_VH)}), not {told(bias_V)}"


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device)


def _refuse(problems: Iterator[str] | Sequence[str]) -> None:
    if found := "; ".join(problems):
        raise ValueError(found)


def _answer(part: TokenPart, found: tuple[Tensor, Tensor | None]) -> LogProbabilities:
    log_probability_K, entropy_K = found
    return LogProbabilities(
        log_probability_N=part.spread(log_probability_K),
        entropy_N=None if entropy_K is None else part.spread(entropy_K),
    )


def _spans(hidden_KH: Tensor, columns: int, budget: int) -> list[slice]:
    """A token takes its logits in fp32, again in the compute dtype if that is another, and its states' gradient."""
    tokens, hidden = hidden_KH.shape
    item, most = hidden_KH.element_size(), wide(hidden_KH.dtype).itemsize
    each = columns * (most + (item if item < most else 0)) + 2 * hidden * most
    return token_spans(tokens, max(FEWEST_ROWS, budget // max(1, each)))


def _without_autocast(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    @wraps(backward)
    def run(ctx: Any, *upstream: Tensor | None) -> Gradients:
        with _as_given(ctx.part.place_K):
            return backward(ctx, *upstream)

    return run


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: TokenPart, logits_NV: Tensor) -> tuple[Tensor, Tensor | None]:
        with _as_given(logits_NV):
            found = [
                part.statistics(logits_NV[span if part.rows_K is None else part.rows_K[span]], span)
                for span in part.slices(logits_NV, part.every)
            ]
        ctx.part = part
        return _keep(ctx, part.whole(found, logits_NV.dtype), logits_NV)

    @staticmethod
    @once_differentiable("log-probabilities and entropies")
    @_without_autocast
    def backward(ctx: Any, dlog_K: Tensor | None, dentropy_K: Tensor | None) -> Gradients:
        part: TokenPart = ctx.part
        logits_NV, *kept = ctx.saved_tensors
        slopes = part.slopes(kept, dlog_K, dentropy_K)
        make = torch.empty if part.rows_K is None else torch.zeros
        dlogits_NV = make(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
        for span in part.slices(logits_NV, part.every):
            if part.rows_K is None:
                write_gradient(logits_NV[span], slopes[span], part.scale, dlogits_NV[span])
            else:
                rows_C = part.rows_K[span]
                x_CV = logits_NV[rows_C]  # a copy
                write_gradient(x_CV, slopes[span], part.scale, x_CV)
                dlogits_NV.index_copy_(0, rows_C, x_CV)
        return None, dlogits_NV


class _OfHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        part: TokenPart,
        ops: FusedOps,
        spans: Sequence[slice],
        hidden_KH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        found = []
        with _as_given(hidden_KH):
            for span, logits_CV in _chunks(ops, spans, hidden_KH, ops.wide_operand(weight_VH), bias_V):
                for piece, x_CV in _pieces(part, span, logits_CV):
                    found.append(part.statistics(x_CV, piece))
        ctx.part, ctx.ops, ctx.spans, ctx.has_bias = part, ops, spans, bias_V is not None
        given = (hidden_KH, weight_VH) if bias_V is None else (hidden_KH, weight_VH, bias_V)
        return _keep(ctx, part.whole(found, hidden_KH.dtype), *given)

    @staticmethod
    @once_differentiable("log-probabilities and entropies")
    @_without_autocast
    def backward(ctx: Any, dlog_K: Tensor | None, dentropy_K: Tensor | None) -> Gradients:
        part: TokenPart = ctx.part
        ops: FusedOps = ctx.ops
        hidden_KH, weight_VH, *kept = ctx.saved_tensors
        bias_V = kept.pop(0) if ctx.has_bias else None
        slopes = part.slopes(kept, dlog_K, dentropy_K)
        trains_hidden, trains_weight, trains_bias = ctx.needs_input_grad[3:]
        dtype = wide(hidden_KH.dtype)
        dhidden_KH = torch.empty_like(hidden_KH) if trains_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=dtype) if trains_weight else None
        dbias_V = torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and trains_bias else None
        wide_VH = ops.wide_operand(weight_VH)
        for span, logits_CV in _chunks(ops, ctx.spans, hidden_KH, wide_VH, bias_V):
            for piece, x_CV in _pieces(part, span, logits_CV):
                write_gradient(x_CV, slopes[piece], part.scale, x_CV)
            if dbias_V is not None:
                dbias_V += logits_CV.sum(0)
            dlogits_CV = logits_CV.to(hidden_KH.dtype)
            add_product(dweight_VH, dlogits_CV, hidden_KH[span], ops)
            if dhidden_KH is not None:
                own_CH = ops.wide_mm(dlogits_CV, wide_VH)
                dhidden_KH[span] = own_CH if part.shards is None else summed(own_CH, part.shards)
        dweight_VH = None if dweight_VH is None else dweight_VH.to(weight_VH.dtype)
        return None, None, None, dhidden_KH, dweight_VH, None if dbias_V is None else dbias_V.to(weight_VH.dtype)


def _chunks(
    ops: FusedOps, spans: Sequence[slice], hidden_KH: Tensor, wide_VH: Tensor, bias_V: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """(the chunk's tokens, their logits in fp32, which the next chunk's overwrite)."""
    most = max((span.stop - span.start for span in spans), default=0)
    room_CV = torch.empty(most, len(wide_VH), dtype=wide(hidden_KH.dtype), device=hidden_KH.device)
    for span in spans:
        logits_CV = ops.wide_mm(hidden_KH[span], wide_VH.T, out=room_CV[: span.stop - span.start])
        if bias_V is not None:
            logits_CV += bias_V
        yield span, logits_CV


def _pieces(part: TokenPart, span: slice, logits_CV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(some of the chunk's tokens, their rows of its logits)."""
    for piece in part.slices(logits_CV, span):
        yield piece, logits_CV[piece.start - span.start : piece.stop - span.start]


def _keep(ctx: Any, whole: Whole, *given: Tensor) -> tuple[Tensor, Tensor | None]:
    """For the backward pass; returns the outputs."""
    ctx.save_for_backward(*given, whole.top_C, whole.mass_C, *(() if whole.mean_C is None else (whole.mean_C,)))
    ctx.set_materialize_grads(False)
    return whole.log_probability_C, whole.entropy_C


def _as_given(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast, which rounds what is to be fp32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
