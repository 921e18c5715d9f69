"""The distillation tile as one Triton kernel: a program reads the rows of one pair from memory two or three times.

`core.ops.distillation` is the readable form, with the formulas, and the oracle of the tests.

pass 1   largest logit (the first of equals) and sum of exponentials, kept together while the row goes by; p.z
pass 2   sums over the vocabulary that need the softmax; where none of them enters the gradient, the gradient too
pass 3   else the gradient

Every place of a block sums its own share of the row, and the places are added at the end: in fp32 that loses less than
one long sum, and the loop has nothing to wait for.

Shape letters: C pairs of the tile, N draft vocabulary, W weights (`SOFT_TERMS`, then the labels' sum), T results,
B places of a block.
"""

# Triton reads the signatures of kernels itself, is untyped, and is missing where the types are checked.
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.devices.api import LOG_TERMS, SOFT_TERMS, TilePairs, TileTeacher, TileTerms

BLOCK = 2048
WARPS = 8  # 8 logits a thread: two 16-byte loads

_CROSS, _REVERSE_KL, _JSD, _TV, _LK_ALPHA = (
    tl.constexpr(SOFT_TERMS.index(name)) for name in ("cross_entropy", "reverse_kl", "jsd", "tv", "lk_alpha")
)
_LABELS = tl.constexpr(len(SOFT_TERMS))
_RESULTS = ("cross_entropy", "normaliser", "alpha", "reverse_kl", "jsd")
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # -inf would make exp(-inf - -inf) of a place without logits
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_LOG_2 = tl.constexpr(0.6931471805599453)


def distillation_tile(logits_CN: Tensor, teacher: TileTeacher, pairs: TilePairs, *, with_grad: bool) -> TileTerms:
    """As `core.ops.distillation.distillation_tile`, for fp32 logits whose rows are contiguous."""
    count = len(logits_CN)
    weight = pairs.weight
    index = {name: label.index_C.clamp_min(0)[:, None] for name, label in pairs.labels.items()}
    at_label = {name: logits_CN.gather(1, index_C1)[:, 0] for name, index_C1 in index.items()}
    taught = {name: label.weight_C.masked_fill(label.index_C < 0, 0.0) for name, label in pairs.labels.items()}
    weights_WC = logits_CN.new_zeros(len(SOFT_TERMS) + 1, count)
    for place, name in enumerate(SOFT_TERMS):
        if name in weight:
            weights_WC[place] = weight[name]
    for taught_C in taught.values():
        weights_WC[-1] += taught_C

    results_TC = logits_CN.new_empty(len(_RESULTS), count)
    best_C = torch.empty(count, dtype=torch.int64, device=logits_CN.device)
    _launch(logits_CN, teacher, pairs, weights_WC, results_TC, best_C, with_grad)
    if with_grad:
        for name, index_C1 in index.items():
            logits_CN.scatter_add_(1, index_C1, -taught[name][:, None])

    found = dict(zip(_RESULTS, results_TC, strict=True))
    alpha_C = found["alpha"]
    found["tv"] = 1 - alpha_C
    found["lk_alpha"] = -alpha_C.clamp_min(torch.finfo(alpha_C.dtype).tiny).log()
    value = {name: found[name] for name in ("cross_entropy", *weight)}
    for name, label in pairs.labels.items():
        value[name] = (found["normaliser"] - at_label[name]).masked_fill_(label.index_C < 0, 0.0)
    return TileTerms(value=value, alpha_C=alpha_C, best_C=best_C)


def _launch(
    logits_CN: Tensor,
    teacher: TileTeacher,
    pairs: TilePairs,
    weights_WC: Tensor,
    results_TC: Tensor,
    best_C: Tensor,
    with_grad: bool,
) -> None:
    count, size = logits_CN.shape
    wanted = set(pairs.weight)
    assert teacher.log_probs_RN is not None or not wanted & LOG_TERMS
    assert size == 1 or logits_CN.stride(1) == 1
    probs_RN = _whole_rows(teacher.probs_RN)
    # What a flag switches off is never read: any pointer will do.
    log_probs_RN = probs_RN if teacher.log_probs_RN is None else _whole_rows(teacher.log_probs_RN)
    inside_R = probs_RN if teacher.inside_R is None else teacher.inside_R.contiguous()
    _pair[(count,)](
        logits_CN,
        probs_RN,
        log_probs_RN,
        inside_R,
        pairs.row_C.contiguous(),
        weights_WC,
        results_TC,
        best_C,
        logits_CN.stride(0),
        probs_RN.stride(0),
        log_probs_RN.stride(0),
        count,
        size,
        INSIDE=teacher.inside_R is not None,
        OVERLAP=bool(wanted & {"tv", "lk_alpha"}),
        REVERSE="reverse_kl" in wanted,
        JSD="jsd" in wanted,
        GRADIENT=with_grad,
        BLOCK=min(BLOCK, triton.next_power_of_2(size)),
        num_warps=WARPS,
    )


def _whole_rows(x_RN: Tensor) -> Tensor:
    return x_RN if x_RN.stride(1) == 1 else x_RN.contiguous()


# The number of pairs differs from tile to tile: compiled for each kind of it, the kernel would be compiled often.
@triton.jit(do_not_specialize=["count"])
def _pair(
    logits_ptr,
    probs_ptr,
    log_probs_ptr,
    inside_ptr,
    row_ptr,
    weights_ptr,
    results_ptr,
    best_ptr,
    logits_stride,
    probs_stride,
    log_probs_stride,
    count,
    size,
    INSIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
    REVERSE: tl.constexpr,
    JSD: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # pair * stride passes 2**31 at 14,000 rows of a large vocabulary
    row = tl.load(row_ptr + pair)
    logits_ptr += pair * logits_stride
    probs_ptr += row * probs_stride
    log_probs_ptr += row * log_probs_stride
    inside = tl.load(inside_ptr + row) if INSIDE else 1.0
    weights_ptr += pair
    results_ptr += pair

    top, total, best, expected = _online_softmax(logits_ptr, probs_ptr, size, BLOCK)
    log_total = tl.log(total)
    per_total = tl.fdiv(1.0, total, ieee_rounding=True)  # the quick division may miss a tie of q with f
    tl.store(best_ptr + pair, best.to(tl.int64))
    tl.store(results_ptr, top + log_total - expected)
    tl.store(results_ptr + count, top + log_total)

    cross = tl.load(weights_ptr + _CROSS * count)
    labels = tl.load(weights_ptr + _LABELS * count)
    alpha, kept, reverse, towards, away = _sums(
        logits_ptr, probs_ptr, log_probs_ptr, size, top, per_total, log_total, inside, cross, labels,
        OVERLAP, REVERSE, JSD, GRADIENT and not (OVERLAP or REVERSE or JSD), BLOCK,
    )  # fmt: skip
    tl.store(results_ptr + 2 * count, alpha)
    if REVERSE:
        tl.store(results_ptr + 3 * count, reverse)
    if JSD:
        tl.store(results_ptr + 4 * count, 0.5 * (towards + away))

    if GRADIENT and (OVERLAP or REVERSE or JSD):
        overlap = tl.load(weights_ptr + _TV * count)
        # Capped: an infinite slope times nothing would be no number.
        overlap += tl.minimum(tl.load(weights_ptr + _LK_ALPHA * count) / tl.maximum(alpha, _TINY), _LARGEST)
        _soft_gradient(
            logits_ptr, probs_ptr, log_probs_ptr, size, top, per_total, log_total, inside, cross, labels,
            kept, overlap,
            reverse, tl.load(weights_ptr + _REVERSE_KL * count),
            towards, 0.5 * tl.load(weights_ptr + _JSD * count),
            OVERLAP, REVERSE, JSD, BLOCK,
        )  # fmt: skip


@triton.jit
def _online_softmax(logits_ptr, probs_ptr, size, BLOCK: tl.constexpr):
    """-> largest logit, sum of exp(z - largest), its first index, p.z (1805.02867)."""
    top_B = tl.full((BLOCK,), _LOWEST, tl.float32)
    total_B = tl.zeros((BLOCK,), tl.float32)
    best_B = tl.zeros((BLOCK,), tl.int32)
    expected_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        n_B = start + tl.arange(0, BLOCK)
        real_B = n_B < size
        z_B = tl.load(logits_ptr + n_B, mask=real_B, other=float("-inf"))
        p_B = tl.load(probs_ptr + n_B, mask=real_B, other=0.0)
        expected_B += tl.where(real_B, p_B * z_B, 0.0)
        best_B = tl.where(z_B > top_B, n_B, best_B)
        higher_B = tl.maximum(top_B, z_B)
        total_B = total_B * tl.exp(top_B - higher_B) + tl.exp(z_B - higher_B)
        top_B = higher_B
    top = tl.max(top_B, 0)
    total = tl.sum(total_B * tl.exp(top_B - top), 0)
    best = tl.min(tl.where(top_B == top, best_B, size - 1), 0)
    return top, total, best, tl.sum(expected_B, 0)


@triton.jit
def _sums(
    logits_ptr, probs_ptr, log_probs_ptr, size, top, per_total, log_total, inside, cross, labels,
    OVERLAP: tl.constexpr, REVERSE: tl.constexpr, JSD: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-> alpha, sum of q where q <= f, KL(q|p), KL(q|m), KL(p|m); WRITE: the gradient of cross-entropy and labels."""
    alpha_B = tl.zeros((BLOCK,), tl.float32)
    kept_B = tl.zeros((BLOCK,), tl.float32)
    reverse_B = tl.zeros((BLOCK,), tl.float32)
    towards_B = tl.zeros((BLOCK,), tl.float32)
    away_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        n_B = start + tl.arange(0, BLOCK)
        real_B = n_B < size
        z_B = tl.load(logits_ptr + n_B, mask=real_B, other=float("-inf"))
        p_B = tl.load(probs_ptr + n_B, mask=real_B, other=0.0)
        q_B = tl.exp(z_B - top) * per_total
        f_B = inside * p_B
        alpha_B += tl.minimum(f_B, q_B)
        if OVERLAP:
            kept_B += tl.where(q_B <= f_B, q_B, 0.0)
        if REVERSE or JSD:
            log_p_B = tl.load(log_probs_ptr + n_B, mask=real_B, other=0.0)
            log_ratio_B = tl.where(real_B, z_B - top, 0.0) - log_total - log_p_B
            if REVERSE:
                reverse_B += q_B * log_ratio_B
            if JSD:
                towards_B += q_B * _log_over_mean(log_ratio_B)
                # A token that the teacher excludes has log p = -inf and adds nothing.
                away_B += tl.where(p_B > 0, p_B * _log_over_mean(-log_ratio_B), 0.0)
        if WRITE:
            tl.store(logits_ptr + n_B, cross * (q_B - p_B) + labels * q_B, mask=real_B)
    return (
        tl.sum(alpha_B, 0),
        tl.sum(kept_B, 0),
        tl.sum(reverse_B, 0),
        tl.sum(towards_B, 0),
        tl.sum(away_B, 0),
    )


@triton.jit
def _soft_gradient(
    logits_ptr, probs_ptr, log_probs_ptr, size, top, per_total, log_total, inside, cross, labels,
    kept, overlap, reverse, reverse_weight, towards, half_jsd_weight,
    OVERLAP: tl.constexpr, REVERSE: tl.constexpr, JSD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of all terms over the logits: but for cross-entropy's p, q times a factor each."""
    for start in range(0, size, BLOCK):
        n_B = start + tl.arange(0, BLOCK)
        real_B = n_B < size
        z_B = tl.load(logits_ptr + n_B, mask=real_B, other=float("-inf"))
        p_B = tl.load(probs_ptr + n_B, mask=real_B, other=0.0)
        q_B = tl.exp(z_B - top) * per_total
        factor_B = tl.zeros((BLOCK,), tl.float32) + labels
        if OVERLAP:
            factor_B += overlap * (kept - tl.where(q_B <= inside * p_B, 1.0, 0.0))
        if REVERSE or JSD:
            log_p_B = tl.load(log_probs_ptr + n_B, mask=real_B, other=0.0)
            log_ratio_B = z_B - top - log_total - log_p_B
            if REVERSE:
                factor_B += reverse_weight * (log_ratio_B - reverse)
            if JSD:
                factor_B += half_jsd_weight * (_log_over_mean(log_ratio_B) - towards)
        tl.store(logits_ptr + n_B, cross * (q_B - p_B) + factor_B * q_B, mask=real_B)


@triton.jit
def _log_over_mean(log_ratio_B):
    """log(a / ((a + b) / 2)) from log(a / b), as log 2 - log(1 + b / a) without overflow."""
    return _LOG_2 - tl.maximum(-log_ratio_B, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(log_ratio_B)))
