"""A training step never waits for the device: it runs on tensors that have no values to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Moment

OBJECTIVES = [
    {"cross_entropy": 1.0},
    dict.fromkeys(("kl", "reverse_kl", "jsd", "tv", "lk_alpha", "lk_lambda", "argmax"), 1.0),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["cross_entropy", "all_terms"])
@pytest.mark.parametrize("supervised", [1.0, 0.3], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "options", [{"normalisation": "token"}, {"normalisation": "per_sequence"}, {"attention": "mla"}], ids=str
)
def test_a_step_reads_no_number_from_the_device(
    make_world: Callable[..., Any],
    step_without_values: Callable[..., None],
    objective: dict[str, float],
    supervised: float,
    options: dict[str, str],
) -> None:
    ids_N = torch.arange(0, 300, 3)
    world = make_world(ids_N=ids_N, unroll=3, dtype=torch.float32, objective=objective, **options)
    lengths = (160, 147)
    masks = [torch.arange(n) >= n * (1 - supervised) for n in lengths]
    features = [world.features(world.tokens(n, n), n) for n in lengths]
    step_without_values(world, FeatureRows.of(features, masks), Moment())
