"""Weights of the pairs against loops over pairs and sequences."""

from __future__ import annotations

import pytest
import torch

from torchspec.core.objectives.weighting import per_sequence, step_weights

CPU = torch.device("cpu")


def test_a_pair_weighs_the_decay_to_the_power_of_its_step() -> None:
    sizes = (3, 0, 2, 1)
    got = step_weights(sizes, 0.8, dtype=torch.float64, device=CPU)
    want = []
    for step, size in enumerate(sizes):
        weight = 1.0
        for _ in range(step):
            weight *= 0.8
        want += [weight] * size
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(want, rel=1e-15)


def test_without_pairs_there_are_no_weights() -> None:
    assert step_weights((0, 0), 0.8, dtype=torch.float32, device=CPU).shape == (0,)


def test_per_sequence_is_the_mean_over_sequences_of_each_ones_mean() -> None:
    """Sequence 3 has pairs but none that counts, sequence 1 has no pairs."""
    base = [1.0, 1.0, 0.8, 0.8, 0.64, 1.0, 0.8]
    coverage = [1.0, 0.25, 0.0, 0.5, 1.0, 0.0, 0.0]
    sequence = [0, 2, 0, 2, 2, 3, 3]
    terms = [0.7, 1.9, 5.0, 0.2, 3.1, 8.0, 9.0]

    means = []
    for wanted in range(5):
        over = under = 0.0
        for weight, cover, owner, term in zip(base, coverage, sequence, terms, strict=True):
            if owner == wanted:
                over, under = over + weight * cover * term, under + weight * cover
        if under > 0:
            means.append(over / under)

    base_M, coverage_M = (torch.tensor(x, dtype=torch.float64) for x in (base, coverage))
    share_M, sequences = per_sequence(base_M, coverage_M, torch.tensor(sequence), 5)
    loss = (share_M * coverage_M * torch.tensor(terms, dtype=torch.float64)).sum() / sequences
    assert sequences.item() == len(means) == 2
    assert sequences.dtype == torch.float64
    assert loss.item() == pytest.approx(sum(means) / len(means), rel=1e-14)
    assert share_M.isfinite().all()
    assert share_M[-2:].tolist() == [0.0, 0.0]  # what is added beside the terms does not count either
