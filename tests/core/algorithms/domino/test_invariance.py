"""However documents are put into rows and micro-batches, and whatever is made again: the same sums and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Moment, StepMemory

LENGTHS = (23, 9, 14, 2)
DRAWS = (7, 8, 9, 10)
OPTIONS: dict[str, dict[str, Any]] = {
    "few anchors": {"num_anchors": 5},
    "per sequence": {"normalisation": "per_sequence"},
    "dpace": {"weighting": "dpace", "num_anchors": 4},
}
WAYS: dict[str, list[tuple[tuple[int, ...], list[list[int]] | None]]] = {
    "each alone": [((n,), None) for n in range(4)],
    "one row": [((0, 1, 2, 3), [[0, 1, 2, 3]])],
    "other order": [((3, 1, 0), [[0, 2], [1]]), ((2,), None)],
}


def rows(world: Any, numbers: Sequence[int], packs: Sequence[Sequence[int]] | None = None) -> FeatureRows:
    features = [world.features(world.tokens(LENGTHS[n], n), n) for n in numbers]
    masks = [torch.rand(LENGTHS[n], generator=torch.Generator().manual_seed(n)) < 0.85 for n in numbers]
    return FeatureRows.of(features, masks, packs)


def moment(numbers: Sequence[int]) -> Moment:
    return Moment(draws=tuple(DRAWS[n] for n in numbers), progress=0.2)


def compare(got: tuple[dict[str, Tensor], ...], want: tuple[dict[str, Tensor], ...]) -> None:
    for found, expected in zip(got, want, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_micro_batches_packing_and_recomputing_change_nothing(
    make_world: Callable[..., Any], options: dict[str, Any]
) -> None:
    world = make_world(**options)
    want = world.gradients([rows(world, range(4))], [moment(range(4))])
    assert all(grad.any() for grad in want[1].values())
    for way in WAYS.values():
        parts = [rows(world, numbers, packs) for numbers, packs in way]
        compare(world.gradients(parts, [moment(numbers) for numbers, _ in way]), want)
    for memory in (StepMemory(recompute=True), StepMemory(loss_bytes=1)):
        compare(world.gradients([rows(world, range(4))], [moment(range(4))], memory), want)


def test_without_supervision_every_gradient_is_a_finite_zero(make_world: Callable[..., Any]) -> None:
    world = make_world(dtype=torch.float32)
    features = [world.features(world.tokens(n, n), n) for n in (9, 4)]
    given = FeatureRows.of(features, [torch.zeros(n, dtype=torch.bool) for n in (9, 4)])
    sums, grads = world.gradients([given], [Moment(draws=(1, 2))])
    assert float(sums["loss_numerator"]) == float(sums["loss_denominator"]) == 0.0
    for name, grad in grads.items():
        assert torch.equal(grad, torch.zeros_like(grad)), name


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_is_near_the_peak(
    make_world: Callable[..., Any],
    peak_bytes: Callable[[Callable[[], object]], int],
    recompute: bool,
) -> None:
    tokens = 500
    world = make_world(dtype=torch.float32, block_size=6, gru_hidden_dim=40, emb_dim=24, num_anchors=tokens)
    given = FeatureRows.of([world.features(world.tokens(tokens))], [torch.ones(tokens, dtype=torch.bool)])

    def run() -> None:
        memory = StepMemory(recompute=recompute, loss_bytes=1)
        world.step(given, Moment(draws=(1,)), memory).numerator.backward()

    run()
    world.draft.zero_grad()
    gradients = sum(4 * parameter.numel() for parameter in world.draft.parameters())
    estimate = 4 * tokens * world.algorithm.kept_values(recompute=recompute, text=tokens)
    assert estimate == pytest.approx(peak_bytes(run) - gradients, rel=0.2)
