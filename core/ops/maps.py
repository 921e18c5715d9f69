"""Products of linear maps without bias, forward and backward: in the operands' precision, or in FP8.

A map W [Z, H] makes y = x W^T; with g = dy the gradients are dx = g W and dW = g^T x. Several maps of the same rows
are done together. An output head's logits come in fp32 and their gradients are given in it.

In FP8 (`Fp8Maps`) each of the three products takes both operands in FP8, scaled along the axis that it sums over:

    y    x by rows of x,    W by rows of W
    dx   g by rows of g,    W by columns of W
    dW   g by columns of g, x by columns of x

With one scale for each row, what a row of y and dx comes to depends on no other row; with one for all, and in dW,
scales are those of the rows that this rank computes together. Inputs, weights and results are bf16, and what is kept
for the backward pass as well.

Shape letters: R rows, H input features, Z output features of one map, C rows of a head, N its outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchspec.core.ops.fp8 import E4M3, E5M2, Scaled, ScaledProducts, Scaling, fits, scaled, scaled_across
from torchspec.core.ops.fp8_weight import Fp8Weight


class WideProducts(Protocol):
    """What of a device's operators a head needs."""

    def wide_operand(self, x: Tensor) -> Tensor: ...
    def wide_mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor: ...


class OutputHead:
    """The products of a head W [N, H] for one pass: logits in fp32, and what their gradient, given in it, comes to."""

    def __init__(self, head_NH: Tensor, ops: WideProducts) -> None:
        self._head_NH, self._ops = head_NH, ops
        self._wide_HN = ops.wide_operand(head_NH).T

    def room(self, rows: int, dtype: torch.dtype) -> Tensor | None:
        """Where the logits of so many rows and fewer are put, pass after pass; None if they make room themselves."""
        return torch.empty(rows, len(self._head_NH), dtype=dtype, device=self._head_NH.device)

    def logits(self, rows_CH: Tensor, out: Tensor | None = None) -> Tensor:
        """rows W^T, [C, N]; a part of `room`, if given, is written to."""
        return self._ops.wide_mm(rows_CH, self._wide_HN, out=out)

    def narrowed(self, dlogits_CN: Tensor, rows_CH: Tensor) -> Tensor:
        """The gradient of the logits as `backward` takes it."""
        return dlogits_CN.to(rows_CH.dtype)

    def backward(self, dlogits_CN: Tensor, rows_CH: Tensor, total_NH: Tensor | None) -> Tensor:
        """The gradient of the rows, [C, H]; that of W is added to `total_NH`, if wanted."""
        add_product(total_NH, dlogits_CN, rows_CH, self._ops)
        return dlogits_CN @ self._head_NH


def add_product(total_NH: Tensor | None, dlogits_CN: Tensor, rows_CH: Tensor, ops: WideProducts) -> None:
    """total += dlogits^T rows, in the total's precision; nothing where no total is wanted."""
    if total_NH is None:
        return
    if total_NH.dtype == dlogits_CN.dtype:
        total_NH.addmm_(dlogits_CN.T, rows_CH)
    else:
        total_NH += ops.wide_mm(dlogits_CN.T, rows_CH)


class MapGradients:
    """Of outputs whose gradients are `douts` [R, Z], one for each map."""

    def __init__(self, douts_RZ: Sequence[Tensor]) -> None:
        self.douts_RZ = douts_RZ

    def of_rows(self, weights_ZH: Sequence[Tensor]) -> Tensor:
        """The gradient of the rows that all maps read, [R, H]."""
        (first, *others), (weight_ZH, *more) = self.douts_RZ, weights_ZH
        total = first @ weight_ZH
        for dout_RZ, other_ZH in zip(others, more, strict=True):
            total.addmm_(dout_RZ, other_ZH)
        return total

    def of_weights(self, rows_RH: Tensor, weights_ZH: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each map, [Z, H]."""
        return [dout_RZ.T @ rows_RH for dout_RZ in self.douts_RZ]


class LinearMaps:
    """In the operands' own precision."""

    def forward(self, rows_RH: Tensor, weights_ZH: Sequence[Tensor], adds_RZ: Sequence[Tensor | None]) -> list[Tensor]:
        """add + rows @ W^T for each map, [R, Z]."""
        return [
            rows_RH @ weight_ZH.T if add_RZ is None else torch.addmm(add_RZ, rows_RH, weight_ZH.T)
            for weight_ZH, add_RZ in zip(weights_ZH, adds_RZ, strict=True)
        ]

    def gradients(self, douts_RZ: Sequence[Tensor]) -> MapGradients:
        return MapGradients(douts_RZ)

    def head(self, head_NH: Tensor, ops: WideProducts, *, frozen: bool) -> OutputHead:
        """Of one pass; `frozen`: the whole that `head_NH` is, or is a part of, is not trained."""
        return OutputHead(head_NH, ops)


class FrozenOperands:
    """Weights that are not trained, made ready once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool], tuple[weakref.ref[Tensor], int, Scaled]] = {}

    def find(self, weight: Tensor, *, across: bool) -> Scaled | None:
        kept = self._made.get((id(weight), across))
        return kept[2] if kept is not None and kept[0]() is weight and kept[1] == weight._version else None

    def keep(self, weight: Tensor, operand: Scaled, *, across: bool) -> None:
        self._made = {key: kept for key, kept in self._made.items() if kept[0]() is not None}
        self._made[id(weight), across] = (weakref.ref(weight), weight._version, operand)


class Fp8Maps(LinearMaps):
    """In FP8 by a device's `scaled_mm`, for one micro-batch: each weight is made ready once in each direction.

    Gradients are e4m3 with a scale for each row and e5m2, of wider range and half the precision, with one for all rows,
    which may be of very different sizes. A weight whose sizes are no multiples of 16 is left to its own precision.
    """

    def __init__(self, products: ScaledProducts, scaling: Scaling, frozen: FrozenOperands) -> None:
        self.products, self.scaling = products, scaling
        self.gradient = E5M2 if scaling == "tensor" else E4M3
        self._frozen = frozen
        self._weights: dict[tuple[object, ...], tuple[Tensor, Scaled]] = {}

    def forward(self, rows_RH: Tensor, weights_ZH: Sequence[Tensor], adds_RZ: Sequence[Tensor | None]) -> list[Tensor]:
        """See `LinearMaps.forward`."""
        operand = self.rows(rows_RH) if any(map(fits, weights_ZH)) else None
        found = []
        for weight_ZH, add_RZ in zip(weights_ZH, adds_RZ, strict=True):
            if operand is None or not fits(weight_ZH):
                found += super().forward(rows_RH, [weight_ZH], [add_RZ])
                continue
            out_RZ = self.products.scaled_mm(operand, self.weight(weight_ZH), rows_RH.dtype)
            found.append(out_RZ if add_RZ is None else out_RZ.add_(add_RZ))
        return found

    def gradients(self, douts_RZ: Sequence[Tensor]) -> Fp8Gradients:
        return Fp8Gradients(douts_RZ, self)

    def head(self, head_NH: Tensor, ops: WideProducts, *, frozen: bool) -> OutputHead:
        """See `LinearMaps.head`."""
        if fits(head_NH):
            return Fp8Head(head_NH, self, frozen)
        plain_NH = head_NH.plain() if isinstance(head_NH, Fp8Weight) else head_NH
        return super().head(plain_NH, ops, frozen=frozen)

    def rows(self, x_RK: Tensor, dtype: torch.dtype = E4M3) -> Scaled:
        return scaled(x_RK, dtype, self.scaling, self.products.temporary_bytes)

    def columns(self, x_RC: Tensor, dtype: torch.dtype = E4M3) -> Scaled:
        return scaled_across(x_RC, dtype, self.scaling, self.products.temporary_bytes)

    def weight(self, weight_ZH: Tensor, *, across: bool = False, frozen: bool = False) -> Scaled:
        """By its rows, or `across` by its columns."""
        make = self.columns if across else self.rows
        if frozen:
            operand = self._frozen.find(weight_ZH, across=across)
            if operand is None:
                self._frozen.keep(weight_ZH, operand := make(weight_ZH), across=across)
            return operand
        # Parts of a weight are new tensors over the same memory each time they are cut. The tensor is kept, and with it
        # its memory: nothing else can come to stand at that address meanwhile.
        ready = weight_ZH if isinstance(weight_ZH, Fp8Weight) else None
        place = weight_ZH if ready is None else ready.e4m3
        key = (place.data_ptr(), weight_ZH.shape, weight_ZH.stride(), across)
        if key not in self._weights:
            made = make(weight_ZH) if ready is None else ready.operand(self.products.temporary_bytes, across=across)
            self._weights[key] = (weight_ZH, made)
        return self._weights[key][1]


class Fp8Gradients(MapGradients):
    """See `Fp8Maps`."""

    def __init__(self, douts_RZ: Sequence[Tensor], maps: Fp8Maps) -> None:
        super().__init__(douts_RZ)
        self._maps = maps
        self._operands: dict[int, Scaled] = {}

    def of_rows(self, weights_ZH: Sequence[Tensor]) -> Tensor:
        maps, total = self._maps, None
        for number, (dout_RZ, weight_ZH) in enumerate(zip(self.douts_RZ, weights_ZH, strict=True)):
            if fits(weight_ZH):
                by_columns = maps.weight(weight_ZH, across=True)
                share_RH = maps.products.scaled_mm(self._by_rows(number), by_columns, dout_RZ.dtype)
            else:
                share_RH = dout_RZ @ weight_ZH
            total = share_RH if total is None else total.add_(share_RH)
        assert total is not None
        return total

    def of_weights(self, rows_RH: Tensor, weights_ZH: Sequence[Tensor]) -> list[Tensor]:
        maps = self._maps
        operand = maps.columns(rows_RH) if any(map(fits, weights_ZH)) else None
        found = []
        for number, (dout_RZ, weight_ZH) in enumerate(zip(self.douts_RZ, weights_ZH, strict=True)):
            if operand is None or not fits(weight_ZH):
                found.append(dout_RZ.T @ rows_RH)
            else:
                found.append(maps.products.scaled_mm(self._by_columns(number), operand, weight_ZH.dtype))
        return found

    def _by_rows(self, number: int) -> Scaled:
        operand = self._maps.rows(self.douts_RZ[number], self._maps.gradient)
        if self._maps.scaling == "tensor":  # the same numbers serve both directions
            self._operands[number] = operand
        return operand

    def _by_columns(self, number: int) -> Scaled:
        kept = self._operands.pop(number, None)
        return self._maps.columns(self.douts_RZ[number], self._maps.gradient) if kept is None else kept.turned()


class Fp8Head(OutputHead):
    """See `Fp8Maps`. Gradients are put into FP8 as they are, in fp32."""

    def __init__(self, head_NH: Tensor, maps: Fp8Maps, frozen: bool) -> None:
        self._head_NH, self._maps, self._frozen = head_NH, maps, frozen

    def room(self, rows: int, dtype: torch.dtype) -> Tensor | None:
        """See `OutputHead.room`."""
        return None

    def logits(self, rows_CH: Tensor, out: Tensor | None = None) -> Tensor:
        """See `OutputHead.logits`."""
        maps = self._maps
        weight = maps.weight(self._head_NH, frozen=self._frozen)
        return maps.products.scaled_mm(maps.rows(rows_CH), weight, torch.float32)

    def narrowed(self, dlogits_CN: Tensor, rows_CH: Tensor) -> Tensor:
        """See `OutputHead.narrowed`."""
        return dlogits_CN

    def backward(self, dlogits_CN: Tensor, rows_CH: Tensor, total_NH: Tensor | None) -> Tensor:
        """See `OutputHead.backward`."""
        maps, multiply = self._maps, self._maps.products.scaled_mm
        by_rows = maps.rows(dlogits_CN, maps.gradient)
        weight = maps.weight(self._head_NH, across=True, frozen=self._frozen)
        drows_CH = multiply(by_rows, weight, rows_CH.dtype)
        if total_NH is not None:
            by_columns = by_rows.turned() if maps.scaling == "tensor" else maps.columns(dlogits_CN, maps.gradient)
            total_NH += multiply(by_columns, maps.columns(rows_CH), torch.float32)
        return drows_CH
