"""The first largest entry of each row, against a walk through it in Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchspec.core.ops.extremes import first_max


def walk(row: list[float]) -> tuple[float, int]:
    best = 0
    for place, value in enumerate(row):
        if value > row[best]:
            best = place
    return row[best], best


def check(x_CN: Tensor) -> None:
    value_C, index_C = first_max(x_CN)
    wanted = [walk(row) for row in x_CN.tolist()]
    assert list(zip(value_C.tolist(), index_C.tolist(), strict=True)) == wanted
    assert index_C.dtype == torch.int64
    assert torch.equal(index_C, x_CN.argmax(-1))


SIZES = [1, 2, 127, 128, 129, 255, 256, 257, 384, 5000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_place_can_hold_the_largest(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    x_CN = torch.randn(9, size, generator=generator, dtype=dtype)
    check(x_CN)
    for place in {0, size // 2, min(127, size - 1), min(128, size - 1), size - 1}:
        raised_CN = x_CN.clone()
        raised_CN[:, place] = 50.0
        check(raised_CN)


@pytest.mark.parametrize("size", SIZES)
def test_the_first_of_equals(size: int) -> None:
    """Few distinct values tie within a block, between blocks, and with the rest behind the last block."""
    generator = torch.Generator().manual_seed(size)
    check(torch.randint(0, 3, (20, size), generator=generator).float())
    check(torch.full((2, size), -torch.inf))
    for first in {0, size // 3, size - 1}:
        tied_CN = torch.zeros(1, size)
        tied_CN[:, [first, (first + size) // 2, size - 1]] = 1.0
        check(tied_CN)


@pytest.mark.parametrize("size", [127, 129, 5000])
def test_rows_that_are_not_contiguous(size: int) -> None:
    room = torch.randn(11, 2 * size, generator=torch.Generator().manual_seed(0))
    check(room[:, :size])
    check(room[:, ::2])
    check(room[::2, 3 : 3 + size])
    check(room.T.contiguous()[:size].T)
