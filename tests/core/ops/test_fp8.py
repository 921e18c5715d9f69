"""Operands and products in FP8 against their definitions: every number by loops, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchspec.core.ops.fp8 import (
    E4M3,
    E5M2,
    SMALLEST_SCALE,
    Scaled,
    Scaling,
    emulated_scaled_mm,
    filled,
    fits,
    scaled,
    scaled_across,
)
from torchspec.devices.cuda.ops import hardware_scaled_mm

SMALL = 5 * 32 * 4
"""Slices of five rows."""

Product = Callable[[Scaled, Scaled, torch.dtype], Tensor]


def representable(dtype: torch.dtype) -> list[float]:
    """Every finite number of a format, by its definition: sign, exponent bits, fraction bits (2209.05433, table 1)."""
    fraction, bias, exponents = (3, 7, 16) if dtype == E4M3 else (2, 15, 31)
    found = set()
    for exponent in range(exponents):
        for part in range(1 << fraction):
            if dtype == E4M3 and (exponent, part) == (15, 7):
                continue  # its only NaN; e5m2 keeps a whole exponent for infinity and NaN
            value = part / (1 << fraction) + (exponent > 0)
            found.add(value * 2.0 ** (max(exponent, 1) - bias))
    return sorted(found | {-value for value in found})


def nearest(value: float, choices: list[float]) -> float:
    """Of two as near the one with an even last bit, which is the one at an even place from zero."""
    zero = choices.index(0.0)
    distance = min(abs(value - choice) for choice in choices)
    near = [n for n, choice in enumerate(choices) if abs(value - choice) == distance]
    return choices[min(near, key=lambda n: (n - zero) % 2)]


def scale_of(values: list[float], dtype: torch.dtype) -> float:
    """The least power of two by which all of them are within the format."""
    most = 448.0 if dtype == E4M3 else 57344.0
    exponent = -64
    while max(map(abs, values), default=0.0) > most * 2.0**exponent:
        exponent += 1
    return 2.0**exponent


def random(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows and columns of very different sizes, one row of zeros, and one number far beyond the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-5, 4, rows, dtype=torch.float64)[:, None] * torch.logspace(0, 2, columns, dtype=torch.float64)
    x[rows // 2] = 0
    x[-1, -1] = 3e7
    return x.to(dtype)


def exact(operand: Scaled) -> Tensor:
    return operand.values.double() * operand.scale.double()


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32])
def test_an_operand_is_that_of_the_definition(scaling: Scaling, dtype: torch.dtype, of: torch.dtype) -> None:
    x = random(11, 32, of)
    choices = representable(dtype)
    for transposed, operand in (
        (False, scaled(x, dtype, scaling, SMALL)),
        (True, scaled_across(x, dtype, scaling, SMALL)),
    ):
        rows = (x.T if transposed else x).double().tolist()
        assert operand.values.dtype == dtype
        assert operand.scale.dtype == torch.float32
        assert operand.scale.shape == (len(rows) if scaling == "row" else 1, 1)
        assert operand.values.is_contiguous()
        for number, row in enumerate(rows):
            scale = scale_of(row if scaling == "row" else [v for each in rows for v in each], dtype)
            assert operand.scale[number if scaling == "row" else 0].item() == scale
            wanted = [nearest(value / scale, choices) for value in row]
            assert operand.values[number].double().tolist() == wanted + [0.0] * (filled(len(row)) - len(row))


def test_a_scale_is_the_least_power_of_two_around_the_formats_largest_number() -> None:
    for largest, scale in ((448.0, 1.0), (449.0, 2.0), (447.0, 1.0), (224.0, 0.5), (225.0, 1.0), (896.0, 2.0)):
        x = torch.zeros(1, 16)
        x[0, 3] = largest
        operand = scaled(x, E4M3, "row", SMALL)
        assert operand.scale.item() == scale
        assert abs(operand.values.float()).max() <= 448


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_zeros_and_numbers_too_small_for_a_scale_are_zeros(scaling: Scaling) -> None:
    for value in (0.0, 1e-38, -1e-30):
        operand = scaled(torch.full((2, 16), value), E4M3, scaling, SMALL)
        assert operand.scale.unique().tolist() == [SMALLEST_SCALE]
        assert not operand.values.float().any()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_makes_all_that_its_scale_belongs_to_nan(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(3, 16)
    x[1, 4] = bad
    one = scaled(torch.ones(16, 16), E4M3, "row", SMALL)
    by_row = emulated_scaled_mm(scaled(x, dtype, "row", SMALL), one, torch.float32)
    assert by_row.isnan().all(1).tolist() == [False, True, False]
    assert by_row.isfinite().all(1).tolist() == [True, False, True]
    across = emulated_scaled_mm(
        scaled_across(x, dtype, "row", SMALL), scaled(torch.ones(16, 16), E4M3, "row", SMALL), torch.float32
    )
    assert across.isnan().all(1).nonzero().flatten().tolist() == [4]
    assert emulated_scaled_mm(scaled(x, dtype, "tensor", SMALL), one, torch.float32).isnan().all()


def row_scaled(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    return hardware_scaled_mm(a, b, dtype, row_scaled=True)


def scaled_after(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    return hardware_scaled_mm(a, b, dtype, row_scaled=False)


@pytest.mark.parametrize("multiply", [emulated_scaled_mm, row_scaled, scaled_after])
@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("left", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_the_numbers_the_operands_stand_for(
    multiply: Product, scaling: Scaling, left: torch.dtype, dtype: torch.dtype
) -> None:
    """The CUDA adapter's calls too: PyTorch has the same operator for CPUs. bf16 is rounded once, from fp32's sums."""
    a, b = (
        scaled(random(19, 48, torch.float32, 1), left, scaling, SMALL),
        scaled(random(32, 48, torch.float32, 2), E4M3, scaling, SMALL),
    )
    out = multiply(a, b, dtype)
    assert out.dtype == dtype
    mine, theirs = exact(a).tolist(), exact(b).tolist()
    limit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    for row, got in zip(mine, out.double().tolist(), strict=True):
        for other, value in zip(theirs, got, strict=True):
            products = [x * y for x, y in zip(row, other, strict=True)]
            # Sums of fp32 err by their terms' sizes, the one rounding of the result by its own.
            assert abs(value - math.fsum(products)) <= limit * abs(math.fsum(products)) + 2.0**-20 * math.fsum(
                map(abs, products)
            )


def test_products_of_nothing() -> None:
    a, b = scaled(torch.ones(0, 16), E4M3, "tensor", SMALL), scaled(torch.ones(32, 16), E4M3, "tensor", SMALL)
    for multiply in (emulated_scaled_mm, row_scaled):
        assert multiply(a, b, torch.bfloat16).shape == (0, 32)
        summed = multiply(
            scaled_across(torch.ones(0, 16), E5M2, "row", SMALL),
            scaled_across(torch.ones(0, 32), E4M3, "row", SMALL),
            torch.float32,
        )
        assert summed.shape == (16, 32)
        assert not summed.any()


def test_sizes_that_hardware_takes() -> None:
    assert [filled(n) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]
    assert [fits(torch.empty(z, h)) for z, h in ((16, 32), (16, 40), (24, 32), (48, 48))] == [True, False, False, True]
