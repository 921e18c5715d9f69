"""Activations made again in the backward pass: the same numbers, and only outputs and keys kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.interfaces.algorithm import StepMemory

TOKENS, STEPS = 90, 4


def tensors() -> list[Tensor]:
    """All that have bytes: what other tests of the process compiled may have left fake and functional ones."""
    gc.collect()
    plain = [found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter)]
    return [found for found in plain if found.layout == torch.strided and not torch._is_functional_tensor(found)]


def step(world: Any, supervised: float, memory: StepMemory) -> tuple[Tensor, dict[str, Tensor], int]:
    """(loss, gradients, bytes kept for the backward pass beside parameters, features and the target)."""
    features = [world.features(world.tokens(TOKENS))]
    masks = [torch.arange(TOKENS) >= TOKENS * (1 - supervised)]
    outside = [*world.draft.parameters(), world.head.head_VH, world.head.embedding_VH, features[0].taps_TNH]
    known = {tensor.untyped_storage().data_ptr() for tensor in outside}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    world.draft.zero_grad()
    known |= {tensor.untyped_storage().data_ptr() for tensor in tensors()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = world.step(features, masks, memory)
    for tensor in tensors():  # what checkpointing holds as arguments
        keep(tensor)
    result.numerator.backward()
    grads = {name: parameter.grad.clone() for name, parameter in world.draft.named_parameters()}
    return result.numerator.detach(), grads, sum(kept.values())


@pytest.mark.parametrize("supervised", [1.0, 0.4], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_before_residual": True, "draft_config": {"hidden_size": 32}},
        {"fc_norm": True},
        {"fc_norm": False, "norm_before_fc": True},
        {"attention": "mla", "fc_norm": True},
    ],
)
def test_loss_and_gradients_are_the_same(
    make_world: Callable[..., Any], supervised: float, options: dict[str, Any]
) -> None:
    world = make_world(unroll=STEPS, ids_N=torch.arange(0, 300, 2), **options)
    loss, grads, kept = step(world, supervised, StepMemory())
    again, grads_again, kept_again = step(world, supervised, StepMemory(recompute=True))
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-12, atol=1e-14, msg=name)
    assert kept_again < 0.7 * kept


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"fc_norm": True}, {"attention": "mla"}, {"attention": "mla", "v_head_dim": 16, "kv_lora_rank": 200}],
    ids=["eagle3", "eagle3.1", "latent", "wide_latent"],
)
def test_the_estimate_is_near_the_peak(
    make_world: Callable[..., Any],
    peak_bytes: Callable[[Callable[[], object]], int],
    recompute: bool,
    options: dict[str, Any],
) -> None:
    world = make_world(unroll=7, ids_N=torch.arange(0, 300, 10), dtype=torch.float32, **options)
    tokens = 2000
    features, masks = [world.features(world.tokens(tokens))], [torch.ones(tokens, dtype=torch.bool)]

    def run() -> None:
        memory = StepMemory(recompute=recompute, loss_bytes=1)
        world.step(features, masks, memory).numerator.backward()

    run()
    world.draft.zero_grad()
    gradients = sum(4 * parameter.numel() for parameter in world.draft.parameters())
    estimate = 4 * tokens * world.algorithm.kept_values(recompute=recompute)
    tolerance = 0.06 if "attention" in options else 0.2
    assert estimate == pytest.approx(peak_bytes(run) - gradients, rel=tolerance)


def test_a_small_loss_budget_changes_nothing_but_the_order_of_sums(make_world: Callable[..., Any]) -> None:
    world = make_world(unroll=STEPS, ids_N=torch.arange(0, 300, 2))
    features, masks = [world.features(world.tokens(300))], [torch.ones(300, dtype=torch.bool)]
    results = [world.step(features, masks, StepMemory(loss_bytes=budget)) for budget in (1, 1 << 30)]
    torch.testing.assert_close(results[0].numerator, results[1].numerator, rtol=1e-13, atol=0)
    assert torch.equal(results[0].sums["correct"], results[1].sums["correct"])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_leaves_nothing_behind(make_world: Callable[..., Any], recompute: bool) -> None:
    world = make_world(unroll=STEPS, ids_N=torch.arange(0, 300, 2))
    alive = []
    for _ in range(4):
        step(world, 0.5, StepMemory(recompute=recompute))
        alive.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors()))
    assert alive[1] == alive[2] == alive[3]
