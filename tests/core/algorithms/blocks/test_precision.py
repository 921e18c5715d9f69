"""bf16 compute under FSDP2's mixed precision, and its error against float64 with the same rounded parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Moment

Worlds = Callable[..., Any]
OPTIONS: dict[str, Any] = {
    "ids_N": torch.arange(0, 300, 2),
    "layer_types": ("full", "sliding"),
    "sliding_window": 8,
    "sliding_window_non_causal": True,
    "num_anchors": 30,
    "objective": {"ground_truth": 1.0, "kl": 0.5},
}


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rows(world: Any) -> FeatureRows:
    """Features rounded to bfloat16."""
    features, masks = [], []
    for n in (60, 30, 45):
        feature = world.features(world.tokens(n, n), n, "post_norm")
        for name in ("taps_TNH", "last_TH"):
            object.__setattr__(feature, name, getattr(feature, name).bfloat16().to(world.dtype))
        features.append(feature)
        masks.append(torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.8)
    return FeatureRows.of(features, masks)


def gradients(world: Any) -> tuple[float, dict[str, Tensor]]:
    sums, grads = world.gradients([rows(world)], [Moment(draws=(1, 2, 3))])
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return float(sums["loss_numerator"] / sums["loss_denominator"]), whole


def rounded(world: Any) -> Any:
    with torch.no_grad():
        for parameter in world.draft.parameters():
            parameter.copy_(parameter.bfloat16())
        for name in ("embedding_VH", "head_VH"):
            getattr(world.head, name).copy_(getattr(world.head, name).bfloat16())
    return world


@pytest.mark.parametrize("weighting", ["decay", "dpace"])
def test_bfloat16_compute_with_float32_masters(make_world: Worlds, group: None, weighting: str) -> None:
    exact = rounded(make_world(dtype=torch.float64, weighting=weighting, **OPTIONS))
    want_loss, want = gradients(exact)

    world = rounded(make_world(dtype=torch.float32, weighting=weighting, **OPTIONS))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(world.draft, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    assert isinstance(world.draft.fc.weight, DTensor)
    loss, got = gradients(world)

    assert loss == pytest.approx(want_loss, rel=2e-3)
    for name, gradient in want.items():
        assert got[name].dtype == torch.float32
        error = float((got[name].double() - gradient).norm() / gradient.norm())
        assert error < 0.03, f"{name}: {error:.3f}"


def test_sharded_float32_is_exactly_the_unsharded(make_world: Worlds, group: None) -> None:
    want_loss, want = gradients(make_world(dtype=torch.float32, **OPTIONS))
    world = make_world(dtype=torch.float32, **OPTIONS)
    fully_shard(world.draft, mesh=init_device_mesh("cpu", (1,)))
    loss, got = gradients(world)
    assert loss == want_loss
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name
