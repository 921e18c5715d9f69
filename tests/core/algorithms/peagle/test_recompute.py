"""Activations made again in the backward pass: the same numbers, and only outputs and keys kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.features.rows import TokenRows
from torchspec.core.interfaces.algorithm import Moment, StepMemory

TOKENS = 90


def step(world: Any, memory: StepMemory) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients)."""
    features, masks = [world.features(world.tokens(TOKENS))], [torch.arange(TOKENS) >= 20]
    world.draft.zero_grad()
    result = world.step(features, masks, memory, Moment(draws=(3,)))
    result.numerator.backward()
    return result.numerator.detach(), {name: p.grad.clone() for name, p in world.draft.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"norm_before_residual": True, "hidden_size": 32, "num_layers": 1}])
def test_loss_and_gradients_are_the_same(make_world: Callable[..., Any], options: dict[str, Any]) -> None:
    world = make_world(**{"num_layers": 2, "depths": 5, "ids_N": torch.arange(0, 300, 2)} | options)
    loss, grads = step(world, StepMemory())
    again, grads_again = step(world, StepMemory(recompute=True))
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-12, atol=1e-14, msg=name)


def test_a_small_loss_budget_changes_nothing_but_the_order_of_sums(make_world: Callable[..., Any]) -> None:
    world = make_world(num_layers=1, depths=4, ids_N=torch.arange(0, 300, 2))
    features, masks = [world.features(world.tokens(300))], [torch.ones(300, dtype=torch.bool)]
    results = [world.step(features, masks, StepMemory(loss_bytes=budget)) for budget in (1, 1 << 30)]
    torch.testing.assert_close(results[0].numerator, results[1].numerator, rtol=1e-13, atol=0)
    assert torch.equal(results[0].sums["correct"], results[1].sums["correct"])


@pytest.mark.parametrize(("layers", "ratio"), [(1, 1.0), (3, 0.7)])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_is_near_the_peak(
    make_world: Callable[..., Any],
    peak_bytes: Callable[[Callable[[], object]], int],
    recompute: bool,
    ratio: float,
    layers: int,
) -> None:
    options = {"num_layers": layers, "depths": 8, "depth_ratio": ratio}
    world = make_world(**options, ids_N=torch.arange(0, 300, 10), dtype=torch.float32)
    tokens = 1000
    features, masks = [world.features(world.tokens(tokens))], [torch.ones(tokens, dtype=torch.bool)]

    def run() -> None:
        memory = StepMemory(recompute=recompute, loss_bytes=1)
        world.step(features, masks, memory).numerator.backward()

    run()
    world.draft.zero_grad()
    gradients = sum(4 * parameter.numel() for parameter in world.draft.parameters())
    estimate = 4 * tokens * world.algorithm.kept_values(recompute=recompute)
    assert estimate == pytest.approx(peak_bytes(run) - gradients, rel=0.2)


def test_what_is_said_of_its_attention_and_loss_is_what_runs(make_world: Callable[..., Any]) -> None:
    tokens = 200
    world = make_world(depths=4, depth_ratio=0.5, depth_ratio_min=0.2, num_layers=3)
    ids_T = world.tokens(tokens)
    rows = TokenRows.of([ids_T], [torch.ones(tokens, dtype=torch.bool)])
    batch = world.assembled(rows, [world.features(ids_T)], Moment(draws=(3,)))
    shape = world.algorithm.attention_shape
    elements = [turn_BQ.numel() for turn_BQ in batch.inputs.turns]
    assert (shape.layers, shape.steps, world.algorithm.loss_steps) == (3, len(elements), len(batch.pairs.sizes))
    assert sum(elements) == pytest.approx(shape.steps * shape.queries(tokens, tokens), rel=0.02)
