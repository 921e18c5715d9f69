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

from torchspec.core.algorithms.eagle3.drafter import UnitNorm

Worlds = Callable[..., Any]
CONFIG = {"hidden_size": 64, "rms_norm_eps": 1e-5}


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(
    world: Any, samples: list[tuple[Tensor, Tensor]], rounded: bool = False
) -> tuple[float, dict[str, Tensor]]:
    features = []
    for n, (ids_T, _) in enumerate(samples):
        feature = world.features(ids_T, n, "post_norm")
        if rounded:
            for name in ("taps_TNH", "last_TH"):
                object.__setattr__(feature, name, getattr(feature, name).bfloat16().to(world.dtype))
        features.append(feature)
    masks = [mask_T for _, mask_T in samples]
    result = world.step(features, masks)
    loss = result.numerator / result.denominator
    loss.backward()
    found = {}
    for name, parameter in world.draft.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return float(loss.detach()), found


def samples(world: Any) -> list[tuple[Tensor, Tensor]]:
    return [(world.tokens(n, n), torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.7) for n in (90, 40, 70)]


def rounded(world: Any) -> Any:
    with torch.no_grad():
        for parameter in world.draft.parameters():
            parameter.copy_(parameter.bfloat16())
    return world


def test_bfloat16_compute_with_float32_masters(make_world: Worlds, group: None) -> None:
    options = {"draft_config": CONFIG, "ids_N": torch.arange(0, 300, 2), "unroll": 4}
    exact = rounded(make_world(dtype=torch.float64, **options))
    want_loss, want = gradients(exact, samples(exact), rounded=True)

    world = rounded(make_world(dtype=torch.float32, **options))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(world.draft, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    assert isinstance(world.draft.fc.weight, DTensor)
    loss, got = gradients(world, samples(world), rounded=True)

    # Three decimal digits of mantissa over a layer applied four times; half a per cent of the loss would be a bug.
    assert loss == pytest.approx(want_loss, rel=2e-3)
    for name, gradient in want.items():
        assert got[name].dtype == torch.float32
        error = float((got[name].double() - gradient).norm() / gradient.norm())
        assert error < 0.03, f"{name}: {error:.3f}"


def test_sharded_float32_is_exactly_the_unsharded(make_world: Worlds, group: None) -> None:
    options = {"draft_config": CONFIG, "unroll": 3, "dtype": torch.float32}
    plain = make_world(**options)
    want_loss, want = gradients(plain, samples(plain))
    world = make_world(**options)
    fully_shard(world.draft, mesh=init_device_mesh("cpu", (1,)))
    loss, got = gradients(world, samples(world))
    assert loss == want_loss
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


def test_drafts_in_bfloat16_are_mostly_those_in_float32(make_world: Worlds) -> None:
    options = {"draft_config": CONFIG, "unroll": 4}
    world = rounded(make_world(dtype=torch.float32, **options))
    half = make_world(dtype=torch.bfloat16, **options)
    half.draft.load_state_dict(world.draft.state_dict())
    feature = world.features(world.tokens(60, 1), 1)
    probs = []
    for chosen in (world, half):
        session = chosen.algorithm.drafter(chosen.draft, chosen.head, chosen.device).open(1)
        proposal = session.propose(
            [feature.taps_TNH[:-1]],
            [feature.input_ids_T[1:]],
            3,
            temperature=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        assert proposal.probs_BLV is not None
        assert proposal.probs_BLV.dtype == torch.float32
        probs.append(proposal.probs_BLV[0, 0])
    assert (probs[0] - probs[1]).abs().max() < 0.03 * probs[0].max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_drafters_norm_is_rounded_once(dtype: torch.dtype) -> None:
    """Against float64, rounded to `dtype`: whoever rounds the sum or its root as well is off in many places."""
    x = (3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))).to(dtype)
    wide = x.double()
    want = (wide / (wide.square().sum(-1, keepdim=True) + 1000 * 1e-5).sqrt()).to(dtype)
    got = UnitNorm(1000, 1e-5, x)(x)
    assert got.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    else:
        assert (got != want).float().mean() < 0.01
