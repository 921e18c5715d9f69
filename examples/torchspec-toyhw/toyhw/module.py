"""`torch.toyhw`: the names that PyTorch and torchspec look for in a device's module."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.accelerator import (
    current_device_index,
    current_stream,
    empty_cache,
    max_memory_allocated,
    memory_allocated,
    memory_reserved,
    reset_peak_memory_stats,
    set_device_index,
    set_stream,
    synchronize,
)
from torch.accelerator import get_memory_info as mem_get_info

from toyhw import _C

__all__ = [
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_name",
    "get_rng_state",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "reset_peak_memory_stats",
    "set_device",
    "set_per_process_memory_fraction",
    "set_rng_state",
    "set_stream",
    "stream",
    "synchronize",
]

Where = int | str | torch.device | None


def _index(device: Where) -> int:
    """The index of `device`; where none is named, the current device's."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


def device_count() -> int:
    return _C.device_count()


def is_available() -> bool:
    return device_count() > 0


def get_device_name(device: Where = None) -> str:
    return "toyhw"


def current_device() -> int:
    return current_device_index()


def set_device(device: Where) -> None:
    set_device_index(_index(device))


def set_per_process_memory_fraction(fraction: float, device: Where = None) -> None:
    _C.limit_memory(_index(device), fraction)


def Stream(device: Where = None, priority: int = 0) -> torch.Stream:
    return torch.Stream(torch.device("toyhw", _index(device)), priority=priority)


def Event(enable_timing: bool = False) -> torch.Event:
    return torch.Event("toyhw", enable_timing=enable_timing)


def stream(stream: torch.Stream | None) -> AbstractContextManager[object]:
    """In the block, `stream` is the current one."""
    return nullcontext() if stream is None else stream


def get_rng_state(device: Where = None) -> Tensor:
    return _C.default_generator(_index(device)).get_state()


def set_rng_state(state: Tensor, device: Where = None) -> None:
    _C.default_generator(_index(device)).set_state(state)


def manual_seed(seed: int) -> None:
    _C.default_generator(current_device()).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _C.default_generator(index).manual_seed(seed)


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]
