"""Rotary position embedding (2104.09864) on halves: entry d turns with entry d + D/2.

Shape letters: B batch, S rows, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, contiguous; cos and sin, broadcast over heads, hold every angle twice.

    Turning by -sin is the inverse, and the gradient.
    """
    half = x_BSHD.shape[-1] // 2
    cos, sin = cos_BSD.unsqueeze(-2).to(x_BSHD.dtype), sin_BSD.unsqueeze(-2).to(x_BSHD.dtype)
    out = torch.empty(x_BSHD.shape, dtype=x_BSHD.dtype, device=x_BSHD.device)
    torch.mul(x_BSHD, cos, out=out)
    out[..., :half].addcmul_(x_BSHD[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x_BSHD[..., :half], sin[..., half:])
    return out
