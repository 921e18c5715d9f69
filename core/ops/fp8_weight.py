"""A weight that is there in e4m3 alone, with its scales, and stands for a matrix in bf16.

What multiplies in FP8 takes its numbers as they are (`operand`). Any other operator sees the matrix that they stand
for: e4m3 times a power of two is exact in bf16.

With one scale the same numbers serve by columns. With a scale for each row they are scaled anew, from what the rows
hold; and a part of a weight (rows, or columns) keeps the scales of the whole. Scales are powers of two, so in either
case an entry comes to what its bf16 number would, to the last bit, unless it is subnormal (below 2^-6 s) for one of the
two scales s and t. Then it differs by less than 2^-7 max(s, t), which is less than 2^-14 of the largest number that one
of them was made for: each rounding is off by 2^-10 of its scale, or by 2^-4 of a number below 2^-6 of the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchspec.core.ops.fp8 import Scaled, scaled_across, widened

_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default}
_CUTS = {_aten.slice.Tensor: 0, _aten.split.Tensor: 1, _aten.split_with_sizes.default: 1}
"""Operators that give parts of a matrix, and the place of the axis among what they are given beside it."""


class Fp8Weight(Tensor):
    """`e4m3` [Z, H], `scale` fp32 [Z, 1] or [1, 1]; read it, or differentiate by it: it cannot be written."""

    e4m3: Tensor
    scale: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Fp8Weight:
        made: Fp8Weight = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=dtype, device=values.device
        )
        made.e4m3, made.scale = values, scale
        return made

    def operand(self, temporary_bytes: int, *, across: bool = False) -> Scaled:
        """By its rows, or `across` by its columns: as `scaled` and `scaled_across` give them."""
        if across and self.scale.numel() > 1:
            return scaled_across(self, self.e4m3.dtype, "row", temporary_bytes)
        by_rows = Scaled(values=self.e4m3.contiguous(), scale=self.scale)
        return by_rows.turned() if across else by_rows

    def plain(self) -> Tensor:
        """The matrix that it stands for."""
        return widened(self.e4m3, self.dtype) * self.scale.to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, whole = kwargs or {}, args[0]
        if func in _SAME:
            return cls(whole.e4m3, whole.scale, whole.dtype)
        if func in _CUTS and isinstance(whole, cls):
            return whole._cut(func, *args[1:], **kwargs)
        if func is _aten.as_strided.default and isinstance(whole, cls):
            size, stride, *offset = args[1:]
            if (tuple(size), tuple(stride), *offset) == (whole.shape, whole.stride(), 0):
                return cls(whole.e4m3, whole.scale, whole.dtype)
        if func is _aten.zeros_like.default:
            return func(whole.e4m3, *args[1:], **{"dtype": whole.dtype, **kwargs})
        if func._schema.is_mutable:
            raise TypeError(f"a weight in FP8 cannot be written: {func}")
        return func(*tree_map_only(cls, cls.plain, args), **tree_map_only(cls, cls.plain, kwargs))

    def _cut(self, func: Any, *rest: Any, **kwargs: Any) -> Any:
        place = _CUTS[func]
        axis = rest[place] if len(rest) > place else kwargs.get("dim", 0)
        parts = func(self.e4m3, *rest, **kwargs)
        by_rows = axis in (0, -2) and self.scale.numel() > 1
        scales = func(self.scale, *rest, **kwargs) if by_rows else self.scale
        if isinstance(parts, Tensor):
            return type(self)(parts, scales, self.dtype)
        each = scales if by_rows else [scales] * len(parts)
        return [type(self)(part, scale, self.dtype) for part, scale in zip(parts, each, strict=True)]
