"""Matrices in FP8 and their products, by definition and in plain torch (formats: 2209.05433).

A matrix x [R, K] is held as v [R, K] in e4m3 or e5m2 and a scale s, one for each row or one for all, with x ~ s v:

    s = 2^ceil(log2(max(a, A) / M)),   v = round(x / s)

where a is the largest |x| of the row or of all, M the format's largest number (448 of e4m3, 57344 of e5m2) and A so
small that scales stay normal numbers; a row of zeros has zeros. Scales are powers of two, so that dividing by them and
multiplying with them is exact: an operand is the same on every device, and a product may be scaled before or after it
is rounded. Where x has an infinity or NaN, all that its scale belongs to is NaN, and so is what is multiplied with it.

The product of two operands sums over the last axis of both, in fp32: out = (va vb^T) sa sb^T. Hardware wants that axis
in multiples of 16; rows and columns of zeros stand behind an operand's own.

Shape letters: R rows, K columns that are summed over, C columns of a matrix whose transpose is the operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from torchspec.core.ops.slices import row_slices

Scaling = Literal["row", "tensor"]
"""Whether each row of an operand has a scale of its own, or all have one."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Of it are the sizes that hardware multiplies in FP8."""
SMALLEST_SCALE = 2.0**-64
"""Products of two such are normal in fp32. What is smaller than this times the format's least number becomes zero."""
_EXPONENT, _FRACTION = 0x7F800000, 0x007FFFFF


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled:
    """An operand: `values` [R, K] in float8, contiguous; `scale` fp32 [R, 1], or [1, 1] for all rows."""

    values: Tensor
    scale: Tensor

    def turned(self) -> Scaled:
        """Of the transpose, for one scale; its columns are filled up to a multiple of 16."""
        assert self.scale.numel() == 1, "rows of the transpose would need scales of their own"
        turned = _empty(self.values.shape[1], len(self.values), self.values)
        turned.view(torch.uint8)[:, : len(self.values)] = self.values.view(torch.uint8).T
        return Scaled(values=turned, scale=self.scale)


class ScaledProducts(Protocol):
    """What of a device's operators FP8 needs."""

    temporary_bytes: int

    def scaled_mm(self, a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor: ...


def scaled(x_RK: Tensor, dtype: torch.dtype, scaling: Scaling, temporary_bytes: int) -> Scaled:
    """x as an operand; its K must be a multiple of 16 for hardware. Temporaries have about `temporary_bytes`."""
    scale = power_of_two(largest(x_RK, scaling, temporary_bytes), dtype)
    return Scaled(values=divided(x_RK, scale, dtype, temporary_bytes), scale=scale)


def largest(x_RK: Tensor, scaling: Scaling, temporary_bytes: int) -> Tensor:
    """The largest |x| of each row [R, 1], or of all [1, 1] (0 where there are none); NaN where there is one."""
    of_rows = _largest(x_RK, 1, temporary_bytes)
    if scaling == "row":
        return of_rows
    return torch.cat((of_rows, of_rows.new_zeros(1, 1))).amax(0, keepdim=True)


def divided(x_RK: Tensor, scale: Tensor, dtype: torch.dtype, temporary_bytes: int) -> Tensor:
    """x / scale in `dtype`, for a scale of each row [R, 1] or of all [1, 1]."""
    values = torch.empty(x_RK.shape, dtype=dtype, device=x_RK.device)
    for part in _parts(x_RK, temporary_bytes):
        values[part] = x_RK[part] * _inverse(scale[part] if len(scale) == len(x_RK) else scale, x_RK)
    return values


def scaled_across(x_RC: Tensor, dtype: torch.dtype, scaling: Scaling, temporary_bytes: int) -> Scaled:
    """The transpose of x as an operand [C, R], whose sum goes over R; R is filled up to a multiple of 16."""
    if scaling == "tensor":
        return scaled(x_RC, dtype, scaling, temporary_bytes).turned()
    scale_1C = power_of_two(_largest(x_RC, 0, temporary_bytes), dtype)
    inverse = _inverse(scale_1C, x_RC)
    turned = _empty(x_RC.shape[1], len(x_RC), torch.empty(0, dtype=dtype, device=x_RC.device))
    places = turned.view(torch.uint8)
    for part in _parts(x_RC, temporary_bytes):
        places[:, part] = (x_RC[part] * inverse).to(dtype).view(torch.uint8).T
    return Scaled(values=turned, scale=scale_1C.T.contiguous())


def power_of_two(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales of matrices whose largest absolute values are these, fp32; infinity and NaN stay what they are."""
    ratio = (largest.float() / torch.finfo(dtype).max).clamp_min_(SMALLEST_SCALE)
    # A number's exponent bits alone are the power of two below it; adding all fraction bits first rounds up.
    up = ((ratio.view(torch.int32) + _FRACTION) & _EXPONENT).view(torch.float32)
    return torch.where(ratio.isfinite(), up, ratio)


def emulated_scaled_mm(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a b^T [R of a, R of b] in `dtype`, bf16 or fp32: `FusedOps.scaled_mm` for hardware without such products.

    Numbers of both formats are exact in bf16, and products of bf16 matrices are summed in fp32 and rounded once.
    """
    assert dtype in (torch.bfloat16, torch.float32), f"no scaled product is made in {dtype}"
    out = torch.mm(widened(a.values, dtype), widened(b.values, dtype).T)
    return out.mul_(a.scale.to(dtype)).mul_(b.scale.T.to(dtype))


def widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float8 numbers in another precision; on a CPU by a table, several times faster than its conversion."""
    if values.device.type != "cpu":
        return values.to(dtype)
    index = values.view(torch.uint8).flatten().int()
    return torch.index_select(_table(values.dtype, dtype), 0, index).view(values.shape)


def filled(count: int) -> int:
    """The next multiple of 16."""
    return -(-count // MULTIPLE) * MULTIPLE


def fits(weight_ZH: Tensor) -> bool:
    """Whether hardware multiplies by this matrix, and by its transpose, in FP8."""
    return all(size % MULTIPLE == 0 for size in weight_ZH.shape)


@cache
def _table(narrow: torch.dtype, wide: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(narrow).to(wide)


def _empty(rows: int, columns: int, like: Tensor) -> Tensor:
    """Room for an operand, zeros behind its own columns."""
    made = torch.empty(rows, filled(columns), dtype=like.dtype, device=like.device)
    made.view(torch.uint8)[:, columns:] = 0
    return made


def _inverse(scale: Tensor, x: Tensor) -> Tensor:
    """1 / scale, exact in bf16 too, so that x needs no wider copy."""
    return scale.reciprocal().to(x.dtype)


def _largest(x_RK: Tensor, axis: int, temporary_bytes: int) -> Tensor:
    """The largest |x| along an axis, which stays with one entry; NaN where there is one."""
    parts = [x_RK[part].abs().amax(axis, keepdim=True) for part in _parts(x_RK, temporary_bytes)]
    if not parts:
        return x_RK.new_zeros((0, 1) if axis else (1, x_RK.shape[1]))
    if axis:
        return torch.cat(parts)
    return torch.cat(parts).amax(0, keepdim=True)


def _parts(x_RK: Tensor, temporary_bytes: int) -> Sequence[slice]:
    return list(row_slices(0, len(x_RK), x_RK.shape[1] * x_RK.element_size(), temporary_bytes))
