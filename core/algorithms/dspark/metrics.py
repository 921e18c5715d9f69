"""What DSpark reports of its confidence head beside the figures of blocks.

Shape letters: K steps, M supervised (block, step) pairs grouped by step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchspec.core.algorithms.metrics import per_step


def confidence_sums(logit_M: Tensor, alpha_M: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Per step, [K], over supervised pairs: confidence, and its distance from alpha."""
    confidence_M = torch.sigmoid(logit_M)
    return {
        "confidence": per_step(confidence_M, sizes),
        "confidence_error": per_step((confidence_M - alpha_M).abs(), sizes),
    }


def summarise_confidence(sums: dict[str, Tensor]) -> dict[str, float | list[float]]:
    """Of drafts with a confidence head; a mean over nothing is 0.

    confidence_per_position    mean confidence, to be read beside alpha_per_position
    confidence_error           mean |confidence - alpha| over all supervised pairs
    """
    if "confidence" not in sums:
        return {}
    pairs_K = sums["supervised"].double()
    mean_K = sums["confidence"].double() / pairs_K.clamp_min(1)
    error = sums["confidence_error"].double().sum() / pairs_K.sum().clamp_min(1)
    return {"confidence_per_position": mean_K.tolist(), "confidence_error": error.item()}
