"""The default elementwise operators against their formulas, one number at a time, in float64."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps

OPS = FusedOps()


class OneRow(FusedOps):
    """One row of five numbers at a time."""

    temporary_bytes = 5 * 8


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rms(row: list[float], eps: float) -> float:
    return math.sqrt(sum(value * value for value in row) / len(row) + eps)


def test_rms_norm() -> None:
    x, weight = random(0, 3, 5), random(1, 5)
    got, kept = OPS.rms_norm(x, weight, 1e-3)
    assert kept.numel() == 3, "one value a row"
    for row, out in zip(x.tolist(), got.tolist(), strict=True):
        for value, scale, result in zip(row, weight.tolist(), out, strict=True):
            assert math.isclose(result, value / rms(row, 1e-3) * scale, rel_tol=1e-14)


def test_rms_norm_backward() -> None:
    """With r the root mean square: dy_i / dx_j = w_i ([i = j] - x_i x_j / (H r^2)) / r,  dy_i / dw_i = x_i / r."""
    eps, size = 1e-3, 5
    x, weight, dy = random(0, 2, 3, size), random(1, size), random(2, 2, 3, size)
    _, kept = OPS.rms_norm(x, weight, eps)
    dx, dweight = OPS.rms_norm_backward(dy.clone(), x, weight, kept)
    w, want_dw = weight.tolist(), [0.0] * size
    rows = zip(x.flatten(0, 1).tolist(), dy.flatten(0, 1).tolist(), dx.flatten(0, 1).tolist(), strict=True)
    for row, grad, got in rows:
        r = rms(row, eps)
        for j in range(size):
            want = 0.0
            for i in range(size):
                want += grad[i] * w[i] * ((i == j) - row[i] * row[j] / (size * r * r)) / r
            assert math.isclose(got[j], want, rel_tol=1e-12, abs_tol=1e-14)
            want_dw[j] += grad[j] * row[j] / r
    assert dweight.tolist() == pytest.approx(want_dw, rel=1e-13)


def test_rms_norm_takes_its_statistics_in_fp32() -> None:
    """4096 equal bf16 numbers: a bf16 mean of squares would stop growing at 256."""
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    got, kept = OPS.rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 0.0)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, torch.ones_like(x))
    assert kept.dtype == torch.float32


def test_rms_norm_backward_sums_over_rows_in_fp32() -> None:
    """4096 rows whose shares of dw are all 1."""
    x = torch.full((4096, 2), 3.0, dtype=torch.bfloat16)
    weight = torch.ones(2, dtype=torch.bfloat16)
    _, kept = OPS.rms_norm(x, weight, 0.0)
    dx, dweight = OPS.rms_norm_backward(torch.ones_like(x), x, weight, kept)
    assert dx.dtype == dweight.dtype == torch.bfloat16
    assert dweight.tolist() == [4096.0, 4096.0]


def test_rotary_turns_each_pair_by_its_angle_and_back() -> None:
    batch, rows, heads, size = 2, 3, 2, 6
    x = random(0, batch, rows, heads, size)
    angle = random(1, batch, rows, size // 2).repeat(1, 1, 2)
    got = OPS.rotary(x, angle.cos(), angle.sin())
    back = OPS.rotary(x, angle.cos(), -angle.sin())
    for b, s, h, d in torch.cartesian_prod(*map(torch.arange, (batch, rows, heads, size // 2))).tolist():
        given = complex(x[b, s, h, d], x[b, s, h, d + size // 2])
        for out, sign in ((got, 1), (back, -1)):
            want = given * cmath.exp(sign * 1j * float(angle[b, s, d]))
            assert math.isclose(out[b, s, h, d], want.real, abs_tol=1e-14)
            assert math.isclose(out[b, s, h, d + size // 2], want.imag, abs_tol=1e-14)


@pytest.mark.parametrize("ops", [OPS, OneRow()])
def test_swiglu_and_its_gradient(ops: FusedOps) -> None:
    gate, up, dout = random(0, 2, 2, 5), random(1, 2, 2, 5), random(2, 2, 2, 5)
    out = ops.swiglu(gate, up)
    again, dgate, dup = ops.swiglu_backward(dout.clone(), gate, up)
    found = zip(*(x.flatten().tolist() for x in (gate, up, dout, out, again, dgate, dup)), strict=True)
    for g, u, d, *got in found:
        share = 1 / (1 + math.exp(-g))
        silu, slope = g * share, share + g * share * (1 - share)
        assert got == pytest.approx([silu * u, silu * u, d * u * slope, d * silu], rel=1e-13)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32, torch.float64])
def test_wide_products_do_not_round(narrow: torch.dtype) -> None:
    """Integers whose product bf16 could not hold: 16 * 16 + 1."""
    wide = torch.promote_types(narrow, torch.float32)
    a, b = torch.tensor([[16.0, 1.0]], dtype=narrow), torch.tensor([[16.0], [1.0]], dtype=narrow)
    room = torch.empty(1, 1, dtype=wide)
    for got in (OPS.wide_mm(a, b), OPS.wide_mm(a, OPS.wide_operand(b)), OPS.wide_mm(a, b, out=room), room):
        assert got.dtype == wide
        assert got.item() == 257.0
