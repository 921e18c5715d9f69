"""Binding, memory and random state of CUDA devices."""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.devices.api import MemoryStats, UnavailableError


class CudaRuntime:
    """Implements `Runtime`; every call is about the device bound last (torch.cuda's current device)."""

    device_type = "cuda"
    visible_devices_variable: str | None = "CUDA_VISIBLE_DEVICES"
    allocator_variable: str | None = "PYTORCH_CUDA_ALLOC_CONF"
    ray_resource: str | None = "GPU"

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def bind(self, local_rank: int) -> torch.device:
        """`local_rank`'s GPU, or the only one where the launcher shows each rank its own."""
        count = self.device_count()
        index = 0 if count == 1 else local_rank
        if index >= count:
            raise UnavailableError(
                f"local rank {local_rank} has no GPU: {count} are visible\n"
                f"    remedy: start at most {count} ranks on this machine"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def memory(self) -> MemoryStats:
        _, total = torch.cuda.mem_get_info()
        return MemoryStats(allocated=torch.cuda.memory_allocated(), peak=torch.cuda.max_memory_allocated(), total=total)

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def limit_memory(self, fraction: float) -> None:
        torch.cuda.set_per_process_memory_fraction(fraction)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state)
