"""A device without values: on torch's `meta` a number cannot be read, a shape cannot depend on data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.core import registry
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Moment, StepMemory
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
    """Copies between devices must say that nobody waits for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            assert kwargs.get("non_blocking"), f"a copy from {args[0].device} to {out.device} is waited for"
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            assert args[2:] == (True,) or kwargs.get("non_blocking"), "a copy between devices is waited for"
        return out


@pytest.fixture(scope="session")
def block_decoding() -> ModuleType:
    """block_decoding.py, beside this file."""
    spec = importlib.util.spec_from_file_location("block_decoding", Path(__file__).with_name("block_decoding.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def step_without_values() -> Callable[..., None]:
    """step_without_values(world, rows, moment): forward and backward on `meta`, keeping and making again."""

    def step(world: Any, rows: FeatureRows, moment: Moment) -> None:
        draft, ids_N = world.draft, world.draft.vocabulary.ids_N
        draft.to(META)
        vocabulary = VocabularyMap(ids_N=ids_N.to(META), target_size=world.head.embedding_VH.shape[0])
        vocabulary.__dict__["_host_N"] = ids_N  # read when the run began
        draft._map = (draft.d2t, draft.d2t._version, vocabulary)
        table_VH = world.head.head_VH.to(META)
        head = SafetensorsTargetHead(embedding_VH=table_VH, head_VH=table_VH, final_norm=nn.Identity())
        cpu = registry.load_device("cpu")
        device = Device(
            name="meta",
            runtime=cpu.runtime,
            communication=cpu.communication,
            attention=TiledAttention(ShapesOnly(), temporary_bytes=1 << 20),
        )
        rows = replace(rows, taps_BSF=rows.taps_BSF.to(META), last_BXH=rows.last_BXH.to(META))
        for recompute in (False, True):
            with NoBlockingCopies():
                memory = StepMemory(recompute=recompute, loss_bytes=1)
                result = world.algorithm.step(draft, head, rows, device, memory, moment)
                result.numerator.backward()
            assert all(parameter.grad is not None for parameter in draft.parameters())
        with pytest.raises(RuntimeError):
            result.denominator.item()

    return step
