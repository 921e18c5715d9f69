"""What all algorithms report of their (slot, step) pairs: additive sums, and readable figures from added sums.

Shape letters: K steps, M supervised pairs grouped by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchspec.core.objectives.acceptance import summarise_acceptance
from torchspec.core.objectives.distillation import PairTerms


class CountedPairs(Protocol):
    """`size_K` pairs of each step; `sizes` the same on the host."""

    @property
    def size_K(self) -> Tensor: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...


def step_sums(pairs: CountedPairs, terms: PairTerms) -> dict[str, Tensor]:
    """Per step, [K]:

    supervised             pairs whose predicted token is supervised
    counted                of those, the ones in the loss (with coverage `weight`: their teacher mass)
    correct, alpha         over supervised pairs: first choices that agree; chances of acceptance at temperature 1
    cross_entropy, entropy over supervised pairs, each times its share in `counted`; nats
    """
    sizes = pairs.sizes
    return {
        "supervised": pairs.size_K,
        "counted": per_step(terms.coverage_M, sizes),
        "correct": per_step(terms.agree_M, sizes),
        "alpha": per_step(terms.alpha_M, sizes),
        "cross_entropy": per_step(terms.cross_entropy_M * terms.coverage_M, sizes),
        "entropy": per_step(terms.entropy_M * terms.coverage_M, sizes),
    }


def per_step(value_M: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum of each step's pairs, [K]."""
    return torch.stack([value.sum() for value in torch.split(value_M, list(sizes))])


def summarise(sums: dict[str, Tensor], decay: float) -> dict[str, float | list[float]]:
    """Readable figures; a mean over nothing is 0.

    loss                                as optimised (its normalisation is an option)
    kl, kl_per_position                 KL(p | q) over counted pairs, in nats; the first weighted by decay ** k
    accuracy_per_position               supervised pairs whose first choice is the target's
    alpha_per_position                  mean chance that a sampled token is accepted, over supervised pairs
    supervised_fraction                 pairs of step 0 over all tokens
    counted_fraction                    of the supervised pairs, the share in the loss
    and those of `summarise_acceptance`, whose lengths are NaN without a round (null in metrics.jsonl).
    """
    kl_K = sums["cross_entropy"].double() - sums["entropy"].double()
    counted_K, supervised_K = sums["counted"].double(), sums["supervised"].double()
    weight_K = decay ** torch.arange(kl_K.numel(), dtype=torch.float64)
    figures: dict[str, float | list[float]] = {
        "loss": _ratio(sums["loss_numerator"], sums["loss_denominator"])[0],
        "kl": _ratio((weight_K * kl_K).sum(), (weight_K * counted_K).sum())[0],
        "kl_per_position": _ratio(kl_K, counted_K),
        "accuracy_per_position": _ratio(sums["correct"], supervised_K),
        "alpha_per_position": _ratio(sums["alpha"], supervised_K),
        "supervised_fraction": _ratio(supervised_K[0], sums["tokens"])[0],
        "counted_fraction": _ratio(counted_K.sum(), supervised_K.sum())[0],
    }
    return figures | summarise_acceptance(sums)


def _ratio(part: Tensor, whole: Tensor) -> list[float]:
    part, whole = part.double().reshape(-1), whole.double().reshape(-1)
    values: list[float] = torch.where(whole > 0, part / whole.where(whole > 0, 1.0), 0.0).tolist()
    return values
