"""Log-sum-exp algebra: attention over a union of key sets from attention over each (2205.14135 section 3.1).

Shape letters: B batch, S rows, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both parts: (out [B, S, H, D], lse [B, H, S]).

    `out` is [B, S, H, D] and `lse` [B, H, S], natural logarithm; a row without keys has lse -inf and out 0, in each
    part and in the result. Both results are fp32 (fp64 if an input is fp64), so that many parts can be merged in turn
    and rounded once. Not for autograd: kernels' log-sum-exps carry no gradient; differentiate in closed form instead.

    lse = log(exp(lse_a) + exp(lse_b));  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
    """
    lse_a, lse_b = _wide(lse_a), _wide(lse_b)
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0.0)  # two empty parts: weights exp(-inf - 0) = 0, not exp(-inf + inf)
    out = _weighted(out_a, lse_a - base) + _weighted(out_b, lse_b - base)
    return out, lse


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _weighted(out_BSHD: Tensor, log_weight_BHS: Tensor) -> Tensor:
    return _wide(out_BSHD) * log_weight_BHS.exp().transpose(1, 2)[..., None]
