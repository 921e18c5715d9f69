"""Activations that wait for the backward pass in the host's memory instead of the device's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from torchspec.core.ops.fp8_weight import Fp8Weight
from torchspec.core.training.sharding import local

SMALLEST_BYTES = 1 << 20
"""A smaller tensor is not worth two transfers."""

_Key = tuple[Any, ...]


@dataclass(eq=False)
class Waiting:
    """One tensor in the host's memory. `here` is its copy on the device, while somebody holds it."""

    host: Tensor
    device: torch.device
    here: weakref.ref[Tensor] | None = None


@dataclass
class HostOffload:
    """Hooks for `torch.autograd.graph.saved_tensors_hooks`.

    `torch.autograd.graph.save_on_cpu` copies a tensor once for every operator that saves it; the unroll saves each
    step's keys at every later one. Here a tensor goes out once and comes back once for those who use it together.
    `away` copies to the host, `back` to the device. `stays` are tensors that are kept in any case, asked for at the
    first use, when a sharded model has gathered its parameters.
    """

    away: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, torch.device], Tensor]
    smallest_bytes: int
    stays: Callable[[], Iterable[Tensor]] = tuple
    _seen: dict[_Key, tuple[StorageWeakRef, Waiting]] = field(default_factory=dict)

    @cached_property
    def _staying(self) -> set[int]:
        return {tensor.untyped_storage()._cdata for tensor in self.stays()}

    def pack(self, tensor: Tensor) -> Tensor | Waiting:
        if isinstance(tensor, Fp8Weight):
            return tensor
        storage = tensor.untyped_storage()
        # Autograd hands over another tensor object, so parameters are known by where they lie.
        if tensor.nbytes < self.smallest_bytes or storage._cdata in self._staying:
            return tensor
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        key = (storage._cdata, *view)
        known = self._seen.get(key)
        # Another tensor may have taken the place of one that is gone.
        if known is None or known[0].expired():  # type: ignore[no-untyped-call]
            place = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            known = (place, Waiting(host=self.away(tensor.detach()), device=tensor.device))
            self._seen[key] = known
        return known[1]

    def unpack(self, packed: Tensor | Waiting) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        here = None if packed.here is None else packed.here()
        if here is None:
            here = self.back(packed.host, packed.device)
            packed.here = weakref.ref(here)
        return here

    def hooks(self) -> AbstractContextManager[object]:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)


def offloaded(model: nn.Module, *, activations: bool) -> AbstractContextManager[object]:
    """What is saved for the backward pass inside this block goes to pinned host memory, but for the model's parameters;
    nothing does if not wanted."""
    if not activations:
        return nullcontext()
    offload = HostOffload(
        away=_to_host, back=_to_device, smallest_bytes=SMALLEST_BYTES, stays=lambda: map(local, model.parameters())
    )
    return offload.hooks()


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
    return host.copy_(tensor, non_blocking=True)


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    return host.to(device, non_blocking=True)
