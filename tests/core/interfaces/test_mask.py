"""Masks written out, against the definition in MaskSpec's docstring."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchspec.core.interfaces.mask import Alignment, MaskSpec

CPU = torch.device("cpu")


@given(
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    alignment=st.sampled_from(["upper_left", "lower_right"]),
    window=st.one_of(st.none(), st.integers(1, 12)),
)
def test_causal_and_window(queries: int, keys: int, alignment: Alignment, window: int | None) -> None:
    mask = MaskSpec.causal(alignment) if window is None else MaskSpec.sliding(window, alignment)
    offset = keys - queries if alignment == "lower_right" else 0
    dense = mask.to_dense(queries, keys, CPU)
    for i in range(queries):
        for j in range(keys):
            near = window is None or i + offset - window < j
            assert bool(dense[0, i, j]) == (j <= i + offset and near)


@given(
    bounds=st.lists(st.tuples(st.integers(-2, 9), st.integers(-2, 9)), min_size=1, max_size=6), keys=st.integers(1, 7)
)
def test_limits_are_clamped_to_the_keys(bounds: list[tuple[int, int]], keys: int) -> None:
    start, end = (torch.tensor([column]) for column in zip(*bounds, strict=True))
    dense = MaskSpec.limits(start, end).to_dense(len(bounds), keys, CPU)
    assert dense[0].tolist() == [[s <= j < e for j in range(keys)] for s, e in bounds]


def test_full_and_dense() -> None:
    assert bool(MaskSpec.full().to_dense(2, 3, CPU).all())
    keep = torch.rand(2, 3, 4) > 0.5
    assert torch.equal(MaskSpec.dense(keep).to_dense(3, 4, CPU), keep)
    with pytest.raises(ValueError, match="no interval bounds"):
        MaskSpec.dense(keep).bounds(3, 4, CPU)


def test_a_window_holds_at_least_one_key() -> None:
    with pytest.raises(ValueError, match="got 0"):
        MaskSpec.sliding(0)
