"""Root-mean-square norm (1910.07467) and its gradient.

With r = 1 / sqrt(mean(x^2) + eps):  y = r x w;  with g = r dy w and u = r x:  dx = g - r u mean(g x),  dw = sum dy u.
Statistics are fp32 (fp64 for fp64); the normed value is rounded to x's dtype before it meets the weight, as in Llama.

Shape letters: ... rows, H features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y [..., H] in x's dtype, r [..., 1])."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
    if wide is x:
        return (x * inverse).mul_(weight_H), inverse
    return (wide * inverse).to(x.dtype) * weight_H, inverse


def rms_norm_backward(dy: Tensor, x: Tensor, weight_H: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(dx in x's dtype, dw in the weight's)."""
    wide = x.to(inverse.dtype)
    unit = wide * inverse
    dy = dy.to(inverse.dtype)
    dweight_H = torch.linalg.vecdot(dy.flatten(0, -2), unit.flatten(0, -2), dim=0)
    grad = dy * weight_H.to(inverse.dtype)
    along = torch.linalg.vecdot(grad, unit).div_(x.shape[-1])[..., None]
    return grad.addcmul_(unit, along, value=-1).mul_(inverse).to(x.dtype), dweight_H.to(weight_H.dtype)
