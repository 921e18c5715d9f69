"""Pieces of a training step that the vendor has fused operators for, forward and backward.

Rotary embedding has no backward call: its gradient is the rotation by -sin, which is what core asks for; the vendor's
own also sums gradients of cos and sin, which nobody needs. No Triton: its kernels do not fit an NPU's local memory, and
the loss runs in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.devices.api import FusedOps
from torchspec.devices.ascend import _ops

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_ROTATED, _MOST_ROTATED = 896, 1000


class AscendOps(FusedOps):
    temporary_bytes = 256 << 20
    loss_bytes = 1 << 30

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not _norms(x, weight):
            return super().rms_norm(x, weight, eps)
        return _ops.rms_norm(x, weight, eps)

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        if not _norms(x, weight):
            return super().rms_norm_backward(dy, x, weight, kept)
        dx, dweight = _ops.rms_norm_backward(dy.to(x.dtype), x, weight, kept)
        return dx, dweight.to(weight.dtype)

    def rotary(self, x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
        batch, _, heads, size = x_BSHD.shape
        takes = x_BSHD.dtype in _DTYPES and size % 2 == 0 and size < _LARGEST_ROTATED
        if not takes or max(batch, heads) >= _MOST_ROTATED:
            return super().rotary(x_BSHD, cos_BSD, sin_BSD)
        return _ops.rotary(x_BSHD, cos_BSD.to(x_BSHD.dtype), sin_BSD.to(x_BSHD.dtype))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        if gate.dtype not in _DTYPES:
            return super().swiglu(gate, up)
        return _ops.swiglu(torch.cat((gate, up), -1))

    def swiglu_backward(self, dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if gate.dtype not in _DTYPES:
            return super().swiglu_backward(dout, gate, up)
        gate_up = torch.cat((gate, up), -1)
        dgate, dup = _ops.swiglu_backward(dout, gate_up).chunk(2, -1)
        return _ops.swiglu(gate_up), dgate, dup


def _norms(x: Tensor, weight: Tensor) -> bool:
    """The operator takes 2 to 8 axes, and one dtype for both."""
    return x.dtype in _DTYPES and weight.dtype == x.dtype and 2 <= x.dim() <= 8
