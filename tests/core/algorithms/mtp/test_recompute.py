"""Activations made again in the backward pass: the same numbers; and the estimate of what is kept, either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.interfaces.algorithm import StepMemory

Worlds = Callable[..., Any]
TOKENS, STEPS = 90, 4
CASES = (("mimo", "qwen2"), ("deepseek", "llama"), ("qwen", "qwen3"))


def step(world: Any, supervised: float, memory: StepMemory) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients)."""
    features = [world.features(world.tokens(TOKENS))]
    world.draft.zero_grad()
    result = world.step(features, [torch.arange(TOKENS) >= TOKENS * (1 - supervised)], memory)
    result.numerator.backward()
    grads = {name: parameter.grad.clone() for name, parameter in world.draft.named_parameters()}
    return result.numerator.detach(), grads


@pytest.mark.parametrize("supervised", [1.0, 0.4], ids=["dense", "sparse"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_loss_and_gradients_are_the_same(make_world: Worlds, family: str, kind: str, supervised: float) -> None:
    world = make_world(family, kind, unroll=STEPS)
    loss, grads = step(world, supervised, StepMemory())
    again, grads_again = step(world, supervised, StepMemory(recompute=True))
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_estimate_is_near_the_peak(
    make_world: Worlds, peak_bytes: Callable[[Callable[[], object]], int], family: str, kind: str, recompute: bool
) -> None:
    world = make_world(family, kind, unroll=5, dtype=torch.float32)
    tokens = 2000
    features, masks = [world.features(world.tokens(tokens))], [torch.ones(tokens, dtype=torch.bool)]

    def run() -> None:
        world.step(features, masks, StepMemory(recompute=recompute, loss_bytes=1)).numerator.backward()

    run()
    world.draft.zero_grad()
    gradients = sum(4 * parameter.numel() for parameter in world.draft.parameters())
    estimate = 4 * tokens * world.algorithm.kept_values(recompute=recompute)
    peak = peak_bytes(run) - gradients
    assert estimate == pytest.approx(peak, rel=0.2)
    if recompute:
        assert peak < 0.75 * 4 * tokens * world.algorithm.kept_values(recompute=False)
