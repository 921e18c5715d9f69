"""A device whose collectives are all wrong, each in its own way; test_ranks.py installs it as a plug-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

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


def load() -> Device:
    return replace(CPU.load(), name="broken", communication=Broken("gloo"))


SPEC = replace(CPU, name="broken", load=load)
