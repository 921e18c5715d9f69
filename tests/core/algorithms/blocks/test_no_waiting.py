"""A training step on blocks never waits for the device: it runs on tensors that have no values to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Moment

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all terms": {
        "objective": dict.fromkeys(("kl", "reverse_kl", "jsd", "tv", "lk_alpha", "argmax", "ground_truth"), 1.0)
    },
    "dpace, per sequence": {"weighting": "dpace", "normalisation": "per_sequence"},
    "sliding": {"layer_types": ("full", "sliding"), "sliding_window": 3, "sliding_window_non_causal": True},
    "from anchor": {"sample_from_anchor": True, "coverage": "weight"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("supervised", [1.0, 0.3, 0.0], ids=["dense", "sparse", "none"])
def test_a_step_reads_no_number_from_the_device(
    make_world: Callable[..., Any],
    step_without_values: Callable[..., None],
    options: dict[str, Any],
    supervised: float,
) -> None:
    world = make_world(ids_N=torch.arange(0, 300, 3), dtype=torch.float32, num_anchors=20, **options)
    lengths = (60, 47)
    masks = [torch.arange(n) >= n * (1 - supervised) for n in lengths]
    features = [world.features(world.tokens(n, n), n) for n in lengths]
    step_without_values(world, FeatureRows.of(features, masks), Moment(draws=(1, 2)))
