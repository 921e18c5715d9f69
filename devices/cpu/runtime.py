"""The host as a device: memory is this process's resident set."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from torchspec.devices._torch_runtime import torch_profile
from torchspec.devices.api import MemoryStats, UnavailableError, malloc_is_tuned

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Have glibc's malloc reuse what is freed and not give it back to the kernel at once; elsewhere nothing.

    A training step frees and takes the same buffers again, and fresh pages cost a fault and a clearing each: two
    ranks that train a draft for the embedded target make 10 to 20 % more tokens per second. Thresholds that the
    environment sets (mallopt(3)) stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not malloc_is_tuned():
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class CpuRuntime:
    """Implements `Runtime`. Any number of ranks may share the CPU."""

    device_type = "cpu"
    visible_devices_variable: str | None = None
    allocator_variable: str | None = None
    ray_resource: str | None = "CPU"

    def device_count(self) -> int:
        return 1

    def bind(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def synchronize(self) -> None:
        """Operators on the CPU have finished when they return."""

    def memory(self) -> MemoryStats:
        """Resident bytes, their peak, and the machine's memory.

        Where the kernel offers no resettable peak (macOS, some sandboxes), the peak is the process's since it started.
        """
        sizes = _status_sizes()
        peak_ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        resident = sizes.get("VmRSS", peak_ever)
        return MemoryStats(
            allocated=resident,
            peak=max(resident, sizes.get("VmHWM", peak_ever)),
            total=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        )

    def reset_peak_memory(self) -> None:
        """Linux: writing 5 to clear_refs sets the peak to the present resident set (proc(5)); elsewhere nothing."""
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            return  # memory() documents what the peak then means

    def limit_memory(self, fraction: float) -> None:
        raise UnavailableError("a process cannot be kept to a part of the memory of a CPU")

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def upload(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """The host is the device: nothing is copied."""
        return lambda: list(tensors)

    def profile(self, directory: Path) -> AbstractContextManager[None]:
        return torch_profile(directory)


def _status_sizes() -> dict[str, int]:
    """The `Vm...` lines of /proc/self/status in bytes; empty where there is no such file."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith("Vm"))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in fields}
