"""From the host to a device, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, as it is needed by what is queued from now on; the host's x may be dropped at once.

    By way of pinned memory, whose allocators know of copies under way. From ordinary memory some devices read after
    `x.to(device, non_blocking=True)` has returned: their queues hold nothing of such a copy but the address.
    """
    if x.device.type != "cpu" or device.type in ("cpu", "meta") or not x.numel():
        return x.to(device, non_blocking=True)
    pinned = x if x.is_pinned() else x.contiguous().pin_memory()
    return pinned.to(device, non_blocking=True)
