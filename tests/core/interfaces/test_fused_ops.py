"""The default elementwise operators against their formulas, one number at a time, in float64."""

from __future__ import annotations

import math

import torch

from torchspec.core.interfaces.device import FusedOps

OPS = FusedOps()


def test_rms_norm() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    got = OPS.rms_norm(x, weight, 1e-3)
    for row, out in zip(x.tolist(), got.tolist(), strict=True):
        rms = math.sqrt(sum(value * value for value in row) / len(row) + 1e-3)
        for value, scale, result in zip(row, weight.tolist(), out, strict=True):
            assert math.isclose(result, value / rms * scale, rel_tol=1e-14)


def test_rms_norm_takes_its_statistics_in_fp32() -> None:
    """4096 equal bf16 numbers: a bf16 mean of squares would stop growing at 256."""
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    got = OPS.rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 0.0)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, torch.ones_like(x))


def test_rotary_turns_each_pair_by_its_angle() -> None:
    torch.manual_seed(0)
    batch, rows, heads, size = 2, 3, 2, 6
    x = torch.randn(batch, rows, heads, size, dtype=torch.float64)
    angle = torch.randn(batch, rows, size // 2, dtype=torch.float64).repeat(1, 1, 2)
    got = OPS.rotary(x, angle.cos(), angle.sin())
    for b in range(batch):
        for s in range(rows):
            for h in range(heads):
                for d in range(size // 2):
                    turn = complex(math.cos(angle[b, s, d]), math.sin(angle[b, s, d]))
                    want = complex(x[b, s, h, d], x[b, s, h, d + size // 2]) * turn
                    assert math.isclose(got[b, s, h, d], want.real, abs_tol=1e-14)
                    assert math.isclose(got[b, s, h, d + size // 2], want.imag, abs_tol=1e-14)


def test_swiglu() -> None:
    gate, up = torch.tensor([-2.0, 0.5], dtype=torch.float64), torch.tensor([3.0, -1.0], dtype=torch.float64)
    want = [g / (1 + math.exp(-g)) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    assert torch.allclose(OPS.swiglu(gate, up), torch.tensor(want, dtype=torch.float64), atol=1e-15)
