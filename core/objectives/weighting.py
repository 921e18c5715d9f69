"""What every supervised (slot, step) pair weighs in the loss, fixed before the forward pass.

Shape letters: M supervised pairs, grouped by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalisation = Literal["token", "per_sequence"]


@dataclass(frozen=True, kw_only=True)
class PairWeights:
    """The loss is sum_m pair_m * CE_m / denominator, both summed over all micro-batches and ranks before dividing.

    coverage_M    how much the pair's row counts: 0, 1, or the teacher's mass inside the draft vocabulary
    """

    coverage_M: Tensor
    pair_M: Tensor
    denominator: Tensor

    @classmethod
    def of(
        cls,
        coverage_M: Tensor,
        sizes: Sequence[int],
        decay: float,
        sequence_M: Tensor,
        sequences: int,
        normalisation: Normalisation,
    ) -> PairWeights:
        """w_k = decay ** k for the `sizes[k]` pairs of step k, times the coverage.

        token: the denominator is the sum of these weights, sum_k w_k n_k. per_sequence: each sequence's weights are
        divided by their sum, and the denominator is the number of sequences that have any.
        """
        step_M = torch.cat([coverage_M.new_full((size,), decay**step) for step, size in enumerate(sizes)])
        weight_M = step_M * coverage_M
        if normalisation == "token":
            return cls(coverage_M=coverage_M, pair_M=weight_M, denominator=weight_M.sum())
        member_GM = sequence_M == torch.arange(sequences, device=sequence_M.device)[:, None]
        total_G = (member_GM * weight_M).sum(-1)
        share_M = weight_M / total_G.where(total_G > 0, 1.0)[sequence_M]
        return cls(coverage_M=coverage_M, pair_M=share_M, denominator=(total_G > 0).sum().to(weight_M.dtype))
