"""Statistics of a softmax over parts of its columns, against the columns in one piece."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.core.objectives.statistics import log_normaliser, merged, statistics


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), max_size=5), min_size=1, max_size=5))
def test_parts_of_a_row_in_any_sizes(parts: list[list[int]]) -> None:
    """Small integers: equal maxima are common, and the first of them counts."""
    row = [x for part in parts for x in part]
    if not row:
        return
    first, found = 0, []
    for part in parts:
        found.append(statistics(torch.tensor([part], dtype=torch.float64).reshape(1, len(part)), first))
        first += len(part)
    got_31 = merged(torch.stack(found))
    top = max(row)
    assert got_31[0].item() == top
    assert got_31[1].item() == pytest.approx(sum(math.exp(x - top) for x in row), rel=1e-14)
    assert got_31[2].item() == row.index(top)
    assert log_normaliser(got_31).item() == pytest.approx(math.log(sum(math.exp(x) for x in row)), rel=1e-14, abs=1e-14)


def test_large_logits_and_many_kinds_at_once() -> None:
    x_2CN = 1e4 * torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [torch.stack([statistics(x_CN[:, lo : lo + 4], lo) for x_CN in x_2CN]) for lo in (0, 4, 8)]
    got_23C = merged(torch.stack(parts))
    assert torch.equal(got_23C[:, 0], x_2CN.amax(-1))
    assert torch.equal(got_23C[:, 2].long(), x_2CN.argmax(-1))
    torch.testing.assert_close(got_23C[:, 0] + got_23C[:, 1].log(), x_2CN.logsumexp(-1), rtol=1e-14, atol=0)
