"""A weight that is there in FP8 alone: what it stands for, its operands and parts, against the whole bf16 matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.models import fused
from torchspec.core.ops.fp8 import E4M3, Scaled, Scaling, emulated_scaled_mm, scaled, scaled_across
from torchspec.core.ops.fp8_weight import Fp8Weight
from torchspec.core.ops.maps import Fp8Maps, FrozenOperands

SMALL = 3 * 64 * 2
Z, H = 48, 64
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda w: w,
    "rows": lambda w: w[16:32],
    "columns": lambda w: w[:, 16:48],
    "the last columns": lambda w: torch.split(w, 32, -1)[1],
    "rows of columns": lambda w: torch.split(w[:, 32:], [16, 32])[1],
}


class Products:
    temporary_bytes = SMALL

    def scaled_mm(self, a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
        return emulated_scaled_mm(a, b, dtype)


def matrix(spread: float) -> Tensor:
    """`spread`: of the rows, in powers of ten; some entries are far below the rest of their row."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(Z, H, generator=generator, dtype=torch.float64)
    made *= torch.logspace(-spread, spread, Z, dtype=torch.float64)[:, None]
    made[:, 5::7] *= 2.0 ** -torch.randint(4, 18, (Z, len(range(5, H, 7))), generator=generator)
    return made.bfloat16()


def in_fp8(weight: Tensor, scaling: Scaling) -> Fp8Weight:
    operand = scaled(weight, E4M3, scaling, SMALL)
    return Fp8Weight(operand.values, operand.scale)


def exact(operand: Scaled) -> Tensor:
    return operand.values.double() * operand.scale.double()


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("part", PARTS)
def test_any_other_operator_sees_what_it_stands_for(scaling: Scaling, part: str) -> None:
    weight = matrix(2.0)
    held, stood_for = in_fp8(weight, scaling), exact(scaled(weight, E4M3, scaling, SMALL))
    cut = PARTS[part](held)
    assert isinstance(cut, Fp8Weight)
    assert cut.dtype == torch.bfloat16
    assert torch.equal(cut.double(), PARTS[part](stood_for))
    assert torch.equal((2 * cut).double(), 2 * PARTS[part](stood_for))
    assert torch.zeros_like(cut, dtype=torch.float32).shape == cut.shape


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_its_operands_are_those_of_the_bf16_matrix_but_for_subnormal_entries(
    scaling: Scaling, across: bool, part: str, spread: float
) -> None:
    weight = matrix(spread)
    whole, cut = in_fp8(weight, scaling), PARTS[part](weight)
    held = PARTS[part](whole)
    assert isinstance(held, Fp8Weight)
    make = scaled_across if across else scaled
    got, wanted = held.operand(SMALL, across=across), make(cut, E4M3, scaling, SMALL)
    assert got.values.is_contiguous()
    assert got.values.shape == wanted.values.shape
    assert got.scale.shape == wanted.scale.shape
    if part == "whole" and (scaling == "tensor" or not across):
        assert torch.equal(got.scale, wanted.scale)
        assert torch.equal(got.values.view(torch.uint8), wanted.values.view(torch.uint8))
    rows, columns = cut.shape
    first = PARTS[part](whole.scale.double().expand(Z, H))  # of each entry
    second = wanted.scale.double().expand(columns, rows).T if across else wanted.scale.double().expand(rows, columns)
    a, b = (exact(each).T[:rows] if across else exact(each) for each in (got, wanted))
    greater = torch.maximum(first, second)
    normal = cut.double().abs() >= greater * 2.0**-6
    assert torch.equal(a[normal], b[normal])
    assert ((a - b).abs() < greater * 2.0**-7)[~normal].all()
    assert (~normal).any()


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_a_map_multiplies_by_it_and_its_gradient_is_a_plain_matrix(scaling: Scaling) -> None:
    """Without subnormal entries, to the last bit; parts, the whole, and another of its size."""
    weight = torch.randn(Z, H, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.where(weight.abs() < 0.1, 0.1, weight)
    generator = torch.Generator().manual_seed(1)
    x, dout = (torch.randn(21, size, generator=generator).bfloat16() for size in (H, Z))
    found = []
    for gathered in (False, True):
        both = (weight, weight.flip(0))
        own, twin = (nn.Parameter(in_fp8(each, scaling) if gathered else each) for each in both)
        rows = x.clone().requires_grad_()
        ops = FusedOps().with_maps(Fp8Maps(Products(), scaling, FrozenOperands()))
        out = fused.linear(rows, own, ops, fused.linear(rows, twin, ops))
        for part in (slice(0, 16), slice(16, 32)):
            out = fused.linear(rows[:, part], own[:, part], ops, out)
        out.backward(dout)
        head = ops.maps.head(own, ops, frozen=False)
        total = torch.zeros_like(own, dtype=torch.float32)
        back = head.backward(dout.float(), x, total)
        assert own.grad is not None
        assert rows.grad is not None
        assert type(own.grad) is Tensor
        found.append((out, own.grad, rows.grad, head.logits(x), back, total))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_head_that_hardware_does_not_multiply_by_is_read_as_bf16() -> None:
    weight = in_fp8(matrix(0.0), "row")[:20]
    ops = FusedOps().with_maps(Fp8Maps(Products(), "row", FrozenOperands()))
    x = torch.randn(5, H).bfloat16()
    wanted = FusedOps().maps.head(weight.plain(), FusedOps(), frozen=False).logits(x)  # type: ignore[attr-defined]
    assert torch.equal(ops.maps.head(weight, ops, frozen=False).logits(x), wanted)


def test_it_is_not_written_to() -> None:
    weight = in_fp8(matrix(0.0), "tensor")
    with pytest.raises(TypeError, match="a weight in FP8 cannot be written"):
        weight.mul_(2)
    with pytest.raises(TypeError, match="cannot be written"):
        weight[:4] = 0
