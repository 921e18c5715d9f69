"""A training step never waits for the device: it runs on tensors that have no values to wait for.

On the `meta` device a number cannot be read, a shape cannot depend on data, and nothing can be copied to the host;
copies to it must say that nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import StepMemory
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import SafetensorsTargetHead
from torchspec.devices._tiled_attention import TiledAttention
from torchspec.devices._tiles import Tile, TileKinds

META = torch.device("meta")


class ShapesOnly:
    """A kernel's results without their values."""

    def takes(self, q: Tensor) -> TileKinds:
        return TileKinds()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class NoBlockingCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            assert kwargs.get("non_blocking"), f"a copy from {args[0].device} to {out.device} is waited for"
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            assert args[2:] == (True,) or kwargs.get("non_blocking"), "a copy between devices is waited for"
        return out


OBJECTIVES = [{"cross_entropy": 1.0}, dict.fromkeys(("kl", "reverse_kl", "jsd", "tv", "lk_alpha", "argmax"), 1.0)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["cross_entropy", "all_terms"])
@pytest.mark.parametrize("supervised", [1.0, 0.3], ids=["dense", "sparse"])
@pytest.mark.parametrize("normalisation", ["token", "per_sequence"])
def test_a_step_reads_no_number_from_the_device(
    make_world: Callable[..., Any], objective: dict[str, float], supervised: float, normalisation: str
) -> None:
    ids_N = torch.arange(0, 300, 3)
    world = make_world(ids_N=ids_N, unroll=3, dtype=torch.float32, objective=objective, normalisation=normalisation)
    lengths = (160, 147)
    masks = [torch.arange(n) >= n * (1 - supervised) for n in lengths]
    features = [world.features(world.tokens(n, n), n) for n in lengths]
    features = [replace(f, taps_TNH=f.taps_TNH.to(META), last_TH=f.last_TH.to(META)) for f in features]

    draft = world.draft.to(META)
    vocabulary = VocabularyMap(ids_N=ids_N.to(META), target_size=300)
    vocabulary.__dict__["_host_N"] = ids_N  # read when the run began
    draft._map = (draft.d2t, draft.d2t._version, vocabulary)
    rows = world.head.head_VH.to(META)
    head = SafetensorsTargetHead(embedding_VH=rows, head_VH=rows, final_norm=nn.Identity())
    attention = TiledAttention(ShapesOnly(), temporary_bytes=1 << 20)
    device = Device(
        name="meta", runtime=world.device.runtime, communication=world.device.communication, attention=attention
    )
    for recompute in (False, True):
        with NoBlockingCopies():
            memory = StepMemory(recompute=recompute, loss_bytes=1)
            result = world.algorithm.step(draft, head, FeatureRows.of(features, masks), device, memory)
            result.numerator.backward()
        assert all(parameter.grad is not None for parameter in draft.parameters())
    with pytest.raises(RuntimeError):
        result.denominator.item()
