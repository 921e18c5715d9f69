"""Merging attention over disjoint key sets, against softmax over their union."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchspec.core.ops.lse import merge

Part = tuple[Tensor, Tensor]


def part(scores_BHSK: Tensor, values_BHKD: Tensor, keys: list[int]) -> Part:
    """Attention over some of the keys; out [B, S, H, D], lse [B, H, S]; empty if there are none."""
    scores = scores_BHSK[..., keys]
    total = scores.exp().sum(-1)
    out = scores.exp() @ values_BHKD[:, :, keys] / total.clamp(min=1e-300)[..., None]
    return out.transpose(1, 2), total.log()


def problem(seed: int, keys: int) -> Part:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 4, keys, dtype=torch.float64, generator=generator) * 5
    values = torch.randn(2, 3, keys, 5, dtype=torch.float64, generator=generator)
    return scores, values


def assert_same(a: Part, b: Part, tolerance: float = 1e-13) -> None:
    assert torch.allclose(a[0].double(), b[0].double(), atol=tolerance, rtol=tolerance)
    assert torch.equal(a[1] == -math.inf, b[1] == -math.inf)
    assert torch.allclose(a[1].double(), b[1].double(), atol=tolerance, rtol=tolerance)


@given(seed=st.integers(0, 1000), owners=st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_any_partition_in_any_order_gives_the_union(seed: int, owners: list[int]) -> None:
    """Parts 0, 1 and 2 hold keys, possibly none; keys of owner 3 belong to nobody."""
    scores, values = problem(seed, len(owners))
    parts = [part(scores, values, [j for j, owner in enumerate(owners) if owner == rank]) for rank in range(3)]
    union = part(scores, values, [j for j, owner in enumerate(owners) if owner < 3])
    assert_same(merge(*merge(*parts[0], *parts[1]), *parts[2]), union)
    assert_same(merge(*parts[2], *merge(*parts[1], *parts[0])), union)


@given(seed=st.integers(0, 1000))
def test_an_empty_part_changes_nothing(seed: int) -> None:
    scores, values = problem(seed, 3)
    whole = part(scores, values, [0, 1, 2])
    empty = torch.zeros_like(whole[0]), torch.full_like(whole[1], -math.inf)
    assert_same(merge(*whole, *empty), whole)
    assert_same(merge(*empty, *whole), whole)
    out, lse = merge(*empty, *empty)
    assert not out.any()
    assert bool((lse == -math.inf).all())


def test_rows_empty_in_one_part_or_in_both() -> None:
    scores, values = problem(0, 4)
    first, second = part(scores, values, [0, 1]), part(scores, values, [2, 3])
    for (out, lse), rows in ((first, [0, 1]), (second, [1, 2])):
        out[:, rows] = 0.0
        lse[:, :, rows] = -math.inf
    out, lse = merge(*first, *second)
    assert not out[:, 1].any()
    assert bool((lse[:, :, 1] == -math.inf).all())
    for row, source in ((0, second), (2, first)):
        assert_same((out[:, row], lse[..., row]), (source[0][:, row], source[1][..., row]))
    assert not out.isnan().any()


@pytest.mark.parametrize("shift", [-600.0, 600.0])
def test_scores_beyond_the_range_of_exp(shift: float) -> None:
    scores, values = problem(3, 6)
    keys = [[0, 1, 2], [3, 4, 5]]
    parts = [part(scores, values, chosen) for chosen in keys]
    out, lse = merge(parts[0][0], (parts[0][1] + shift).float(), parts[1][0], (parts[1][1] + shift).float())
    exact_out, exact_lse = part(scores, values, [0, 1, 2, 3, 4, 5])
    assert torch.allclose(out.double(), exact_out, atol=1e-3)  # fp32 of a number near 600 is exact to 6e-5
    assert torch.allclose(lse.double() - shift, exact_lse, atol=1e-3)


@pytest.mark.parametrize(("given_dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_results_are_wide(given_dtype: torch.dtype, wide: torch.dtype) -> None:
    scores, values = problem(4, 2)
    (out_a, lse_a), (out_b, lse_b) = part(scores, values, [0]), part(scores, values, [1])
    statistics = lse_a.to(wide), lse_b.to(wide)
    out, lse = merge(out_a.to(given_dtype), statistics[0], out_b.to(given_dtype), statistics[1])
    assert (out.dtype, lse.dtype) == (wide, wide)
