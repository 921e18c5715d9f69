"""From the host to a device, without waiting."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Planned = TypeVar("Planned", bound="DataclassInstance")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, as it is needed by what is queued from now on; the host's x may be dropped at once.

    By way of pinned memory, whose allocators know of copies under way. From ordinary memory some devices read after
    `x.to(device, non_blocking=True)` has returned: their queues hold nothing of such a copy but the address.
    """
    if x.device.type != "cpu" or device.type in ("cpu", "meta") or not x.numel():
        return x.to(device, non_blocking=True)
    pinned = x if x.is_pinned() else x.contiguous().pin_memory()
    return pinned.to(device, non_blocking=True)


def fields_to_device(planned: Planned, device: torch.device) -> Planned:
    """With every tensor among its fields on the device; what else it holds is as it was."""
    moved: dict[str, Any] = {
        name: to_device(value, device) for name, value in vars(planned).items() if isinstance(value, Tensor)
    }
    return replace(planned, **moved)
