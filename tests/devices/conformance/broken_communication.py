"""A device whose collectives are all wrong, each in its own way; test_ranks.py installs it as a plug-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchspec.devices.api import Device
from torchspec.devices.cpu import SPEC as CPU
from torchspec.devices.parts import TorchCommunication


class Broken(TorchCommunication):
    def all_to_all(self, parts: Sequence[Tensor], group: Any, rows: Sequence[int] | None = None) -> list[Tensor]:
        return super().all_to_all(parts, group, rows)[::-1]

    def all_gather(self, tensor: Tensor, group: Any) -> list[Tensor]:
        return super().all_gather(tensor, group)[::-1]

    def reduce_scatter(self, parts: Sequence[Tensor], group: Any) -> Tensor:
        return super().reduce_scatter(parts[::-1], group)

    def all_reduce(self, tensor: Tensor, group: Any) -> Tensor:
        dist.all_reduce(tensor, group=group)  # in place
        return tensor

    def ring_exchange(self, tensor: Tensor, group: Any) -> tuple[Tensor, Callable[[], None]]:
        """Gives what it was given: the buffer is read before the message has come."""
        buffer, wait = super().ring_exchange(tensor, group)
        if group.size() > 1:
            wait()
            buffer = tensor.clone()
        return buffer, lambda: None


class Wayward(TorchCommunication):
    """Sends round the other way, and knows no group but the world."""

    def ring_exchange(self, tensor: Tensor, group: Any) -> tuple[Tensor, Callable[[], None]]:
        if group.size() == 1:
            return super().ring_exchange(tensor, group)
        sent, received = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        rank, size = group.rank(), group.size()
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=group, group_peer=(rank - 1) % size),
                dist.P2POp(dist.irecv, received, group=group, group_peer=(rank + 1) % size),
            ]
        )
        return received, lambda: [work.wait() for work in works] and None

    def all_reduce(self, tensor: Tensor, group: Any) -> Tensor:
        return super().all_reduce(tensor, group if group.size() == 1 else dist.group.WORLD)


def load() -> Device:
    return replace(CPU.load(), name="broken", communication=Broken("gloo"))


def load_wayward() -> Device:
    return replace(CPU.load(), name="wayward", communication=Wayward("gloo"))


SPEC = replace(CPU, name="broken", load=load)
WAYWARD = replace(CPU, name="wayward", load=load_wayward)
