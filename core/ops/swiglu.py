"""silu(gate) * up (2002.05202) and its gradient, in slices of rows that a cache holds.

Shape letters: ... rows, I features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.ops.slices import row_slices

_silu_backward = torch.ops.aten.silu_backward.grad_input


def swiglu(gate: Tensor, up: Tensor, temporary_bytes: int) -> Tensor:
    """[..., I] in gate's dtype."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for gate_CI, up_CI, out_CI in _slices(temporary_bytes, gate, up, out):
        torch.mul(F.silu(gate_CI), up_CI, out=out_CI)
    return out


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor, temporary_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(gate) * up again, dgate, dup). `dout` is overwritten: dgate is its storage."""
    dout = dout.contiguous()
    out, dup = torch.empty_like(dout), torch.empty_like(dout)
    for dout_CI, gate_CI, up_CI, out_CI, dup_CI in _slices(temporary_bytes, dout, gate, up, out, dup):
        silu_CI = F.silu(gate_CI)
        torch.mul(dout_CI, silu_CI, out=dup_CI)
        torch.mul(silu_CI, up_CI, out=out_CI)
        dout_CI.mul_(up_CI)
        _silu_backward(dout_CI, gate_CI, grad_input=dout_CI)
    return out, dout, dup


def _slices(temporary_bytes: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [tensor.flatten(0, -2) if tensor.dim() > 2 else tensor for tensor in tensors]
    rows, size = flat[0].shape if flat[0].dim() > 1 else (1, flat[0].numel())
    row_bytes = size * flat[0].element_size()
    if rows * row_bytes <= temporary_bytes:
        yield tuple(flat)
        return
    for part in row_slices(0, rows, row_bytes, temporary_bytes):
        yield tuple(tensor[part] for tensor in flat)
