"""What EAGLE-3 reports of training: additive sums of a micro-batch, and readable figures from added sums.

Shape letters: B rows, S slots of this rank, T positions, K unroll steps, M supervised (slot, step) pairs grouped by
step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.core.algorithms.eagle3.batch import Batch
from torchspec.core.objectives.acceptance import acceptance_sums, prefix_lengths, summarise_acceptance
from torchspec.core.objectives.distillation import PairTerms
from torchspec.core.parallel.sequence import gather_sequence


def pair_sums(batch: Batch, terms: PairTerms) -> dict[str, Tensor]:
    """Sums over this micro-batch, per step [K] unless said otherwise.

    tokens                 scalar: positions of all rows
    supervised             pairs whose predicted token is supervised
    counted                of those, the ones in the loss (with coverage `weight`: their teacher mass)
    correct, alpha         over supervised pairs: first choices that agree; chances of acceptance at temperature 1
    cross_entropy, entropy over supervised pairs, each times its share in `counted`; nats
    and those of `acceptance_sums`.
    """
    sizes = batch.pairs.sizes
    slots = (batch.tokens.document_BT.shape[0], batch.inputs.layout.rows)
    agree_BSK = torch.zeros((*slots, len(sizes)), dtype=torch.bool, device=terms.agree_M.device)
    agree_BSK.view(-1)[batch.pairs.cell_M] = terms.agree_M
    return {
        "supervised": batch.pairs.size_K,
        "counted": per_step(terms.coverage_M, sizes),
        "correct": per_step(terms.agree_M, sizes),
        "alpha": per_step(terms.alpha_M, sizes),
        "cross_entropy": per_step(terms.cross_entropy_M * terms.coverage_M, sizes),
        "entropy": per_step(terms.entropy_M * terms.coverage_M, sizes),
    } | _sequence_sums(batch, prefix_lengths(agree_BSK), len(sizes))


def _sequence_sums(batch: Batch, accepted_BS: Tensor, steps: int) -> dict[str, Tensor]:
    """What is counted over whole sequences: on the first of the ranks that share them, 0 on the others."""
    tokens, sequence = batch.tokens, batch.inputs.sequence
    assert steps < 256, "a prefix length travels in a byte"
    accepted_BT = gather_sequence(accepted_BS.to(torch.uint8), batch.inputs.layout, sequence).long()
    sums = acceptance_sums(accepted_BT, steps, tokens.loss_mask_BT, tokens.document_BT)
    sums["tokens"] = (tokens.document_BT >= 0).sum()
    counts_here = sequence is None or sequence.rank == 0
    return {name: value if counts_here else torch.zeros_like(value) for name, value in sums.items()}


def per_step(value_M: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Sum of each step's pairs, [K]."""
    return torch.stack([value.sum() for value in torch.split(value_M, list(sizes))])


def summarise(sums: dict[str, Tensor], decay: float) -> dict[str, float | list[float]]:
    """Readable figures; a mean over nothing is 0.

    loss                                as optimised (its normalisation is an option)
    kl, kl_per_position                 KL(p | q) over counted pairs, in nats; the first weighted by decay ** k
    accuracy_per_position               supervised pairs whose first choice is the target's
    alpha_per_position                  mean chance that a sampled token is accepted, over supervised pairs
    supervised_fraction                 of all tokens, those that step 0 predicts
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
