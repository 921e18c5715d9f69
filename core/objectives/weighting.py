"""What every supervised (slot, step) pair weighs in the loss, before its target row's coverage.

The loss is sum_m base_m coverage_m term_m / denominator; both sums run over all micro-batches and ranks before the
one division.

Shape letters: M supervised pairs, grouped by step; G sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from torchspec.core.ops.distillation import Label
from torchspec.core.parallel.sequence import SequenceGroup

Normalisation = Literal["token", "per_sequence"]


def step_weights(sizes: Sequence[int], decay: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """decay ** k for the `sizes[k]` pairs of step k, [M]."""
    powers = [torch.full((size,), decay**step, dtype=dtype, device=device) for step, size in enumerate(sizes)]
    return torch.cat(powers)


def per_sequence(
    base_M: Tensor, coverage_M: Tensor, sequence_M: Tensor, sequences: int, group: SequenceGroup | None = None
) -> tuple[Tensor, Tensor]:
    """(the weights over their sequence's sum of covered weights, how many sequences have any).

    With them the loss is each sequence's mean first, then the mean over sequences. A sequence in which nothing is
    covered weighs nothing, what does not go by coverage (a confidence) included: it would be a sum beside means. Of
    sequences that several ranks share, the sums are taken over those, and the first of them counts.
    """
    total_G = torch.zeros(sequences, dtype=base_M.dtype, device=base_M.device)
    total_G.index_add_(0, sequence_M, base_M * coverage_M)
    if group is not None:
        total_G = group.sum(total_G)
    share_M = base_M / total_G.where(total_G > 0, torch.inf)[sequence_M]
    counted = (total_G > 0).sum().to(base_M.dtype)
    return share_M, counted if group is None or group.rank == 0 else torch.zeros_like(counted)


def weigh(
    weights: Mapping[str, float | Tensor], weight_M: Tensor, argmax_M: Tensor | None, truth_M: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Label]]:
    """Each soft term's weight of each pair, and the label terms, of the terms' weights (of all pairs, or [M]) and the
    pairs' covered ones.

    `argmax_M` and `truth_M` are the labels' draft indices; wanted only where their terms are.
    """
    soft: dict[str, Tensor] = {}
    labels: dict[str, Label] = {}
    for name, weight in weights.items():
        if name in ("argmax", "ground_truth"):
            index_M = argmax_M if name == "argmax" else truth_M
            assert index_M is not None
            labels[name] = Label(weight_C=weight * weight_M, index_C=index_M)
        else:
            # KL differs from the cross-entropy by what no draft can change.
            soft_name = "cross_entropy" if name == "kl" else name
            soft[soft_name] = soft.get(soft_name, 0) + weight * weight_M
    return soft, labels
