"""Differentiable pieces of a decoder layer that keep as little as the gradient allows, over a device's `FusedOps`.

A linear map needs its input once more for the gradient of its weight. Where that input is the elementwise function of
something that is kept anyway (a norm, a gate), it is computed again instead of being kept: a few passes over rows,
against a third of the layer's memory.

Shape letters: ... rows, H input features, Z output features of one map, I MLP width, B batch, S rows, P angles,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.ops.once import once_differentiable


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, ops: FusedOps) -> Tensor:
    """`FusedOps.rms_norm`, differentiable once."""
    normed: Tensor = _RMSNorm.apply(x, weight_H, eps, ops)  # type: ignore[no-untyped-call]
    return normed


def rotate(x_BSHD: Tensor, angle_BS: Tensor, tables_PD: tuple[Tensor, Tensor], ops: FusedOps) -> Tensor:
    """`FusedOps.rotary` by the given rows of tables of cos and sin, differentiable once in x; keeps the row numbers."""
    turned: Tensor = _Rotary.apply(x_BSHD, angle_BS, *tables_PD, ops)  # type: ignore[no-untyped-call]
    return turned


def normed_linear(
    x: Tensor, norm_H: Tensor, eps: float, weights_ZH: Sequence[Tensor], adds: Sequence[Tensor | None], ops: FusedOps
) -> tuple[Tensor, ...]:
    """add_i + rms_norm(x) @ W_i^T for each map; keeps x alone. `adds[i]` [..., Z_i] may be None."""
    outs: tuple[Tensor, ...] = _NormedLinear.apply(  # type: ignore[no-untyped-call]
        x, norm_H, eps, ops, len(weights_ZH), *weights_ZH, *adds
    )
    return outs


def linear(x: Tensor, weight_ZH: Tensor, ops: FusedOps, residual: Tensor | None = None) -> Tensor:
    """residual + x @ W^T by the device's `LinearMaps`, differentiable once; keeps x."""
    out: Tensor = _Linear.apply(x, weight_ZH, residual, ops)  # type: ignore[no-untyped-call]
    return out


def gated_linear(gate: Tensor, up: Tensor, weight_HI: Tensor, residual: Tensor, ops: FusedOps) -> Tensor:
    """residual + (silu(gate) * up) @ W^T; keeps gate and up alone."""
    out: Tensor = _GatedLinear.apply(gate, up, weight_HI, residual, ops)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float, ops: FusedOps) -> Tensor:
        normed, kept = ops.rms_norm(x, weight_H, eps)
        ctx.save_for_backward(x, weight_H, kept)
        ctx.ops = ops
        return normed

    @staticmethod
    @once_differentiable("RMS norm")
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_H, kept = ctx.saved_tensors
        return *ctx.ops.rms_norm_backward(dnormed, x, weight_H, kept), None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, angle_BS: Tensor, cos_PD: Tensor, sin_PD: Tensor, ops: FusedOps) -> Tensor:
        ctx.save_for_backward(angle_BS, cos_PD, sin_PD)
        ctx.ops = ops
        return ops.rotary(x_BSHD, cos_PD[angle_BS], sin_PD[angle_BS])

    @staticmethod
    @once_differentiable("rotary embedding")
    def backward(ctx: Any, dout_BSHD: Tensor) -> tuple[Tensor | None, ...]:
        angle_BS, cos_PD, sin_PD = ctx.saved_tensors
        return ctx.ops.rotary(dout_BSHD, cos_PD[angle_BS], -sin_PD[angle_BS]), None, None, None, None


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_H: Tensor, eps: float, ops: FusedOps, maps: int, *weights_adds: Tensor | None
    ) -> tuple[Tensor, ...]:
        normed, _ = ops.rms_norm(x, norm_H, eps)
        rows = normed.flatten(0, -2)
        adds = [None if add is None else add.reshape(len(rows), -1) for add in weights_adds[maps:]]
        outs = ops.maps.forward(rows, weights_adds[:maps], adds)  # type: ignore[arg-type]
        ctx.save_for_backward(x, norm_H, *weights_adds[:maps])
        ctx.eps, ctx.ops = eps, ops
        return tuple(out.unflatten(0, x.shape[:-1]) for out in outs)  # type: ignore[no-untyped-call]

    @staticmethod
    @once_differentiable("normed linear map")
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_H, *weights_ZH = ctx.saved_tensors
        normed, kept = ctx.ops.rms_norm(x, norm_H, ctx.eps)
        rows = normed.flatten(0, -2)
        gradients = ctx.ops.maps.gradients([dout.reshape(len(rows), -1) for dout in douts])
        dweights = gradients.of_weights(rows, weights_ZH)
        dnormed = gradients.of_rows(weights_ZH)
        dx, dnorm_H = ctx.ops.rms_norm_backward(dnormed.unflatten(0, x.shape[:-1]), x, norm_H, kept)
        adds = ctx.needs_input_grad[-len(douts) :]
        dadds = (dout if wanted else None for dout, wanted in zip(douts, adds, strict=True))
        return dx, dnorm_H, None, None, None, *dweights, *dadds


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight_HI: Tensor, residual: Tensor, ops: FusedOps) -> Tensor:
        ctx.save_for_backward(gate, up, weight_HI)
        ctx.ops = ops
        rows = ops.swiglu(gate, up).flatten(0, -2)
        (out,) = ops.maps.forward(rows, (weight_HI,), (residual.flatten(0, -2),))
        return out.view_as(residual)

    @staticmethod
    @once_differentiable("gated linear map")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight_HI = ctx.saved_tensors
        gradients = ctx.ops.maps.gradients([dout.reshape(-1, dout.shape[-1])])
        dgated = gradients.of_rows([weight_HI]).unflatten(0, gate.shape[:-1])
        gated, dgate, dup = ctx.ops.swiglu_backward(dgated, gate, up)
        (dweight,) = gradients.of_weights(gated.flatten(0, -2), [weight_HI])
        return dgate, dup, dweight, dout, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ZH: Tensor, residual: Tensor | None, ops: FusedOps) -> Tensor:
        ctx.save_for_backward(x, weight_ZH)
        ctx.ops = ops
        add = None if residual is None else residual.flatten(0, -2)
        (out,) = ops.maps.forward(x.flatten(0, -2), [weight_ZH], [add])
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable("linear map")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_ZH = ctx.saved_tensors
        wants_x, wants_weight, wants_residual, _ = ctx.needs_input_grad
        gradients = ctx.ops.maps.gradients([dout.reshape(-1, dout.shape[-1])])
        dx = gradients.of_rows([weight_ZH]).view_as(x) if wants_x else None
        dweight = gradients.of_weights(x.flatten(0, -2), [weight_ZH])[0] if wants_weight else None
        return dx, dweight, dout if wants_residual else None, None
