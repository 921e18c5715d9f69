"""What every supervised (slot, step) pair weighs in the loss, before its target row's coverage.

The loss is sum_m base_m coverage_m term_m / denominator; both sums run over all micro-batches and ranks before the
one division.

Shape letters: M supervised pairs, grouped by step; G sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Normalisation = Literal["token", "per_sequence"]


def step_weights(sizes: Sequence[int], decay: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """decay ** k for the `sizes[k]` pairs of step k, [M]."""
    powers = [torch.full((size,), decay**step, dtype=dtype, device=device) for step, size in enumerate(sizes)]
    return torch.cat(powers)


def per_sequence(base_M: Tensor, coverage_M: Tensor, sequence_M: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """(the weights over their sequence's sum of covered weights, how many sequences have any).

    With them the loss is each sequence's mean first, then the mean over sequences.
    """
    total_G = torch.zeros(sequences, dtype=base_M.dtype, device=base_M.device)
    total_G.index_add_(0, sequence_M, base_M * coverage_M)
    share_M = base_M / total_G.where(total_G > 0, 1.0)[sequence_M]
    return share_M, (total_G > 0).sum().to(base_M.dtype)
