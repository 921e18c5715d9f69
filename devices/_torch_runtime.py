"""`Runtime` over a device's module of PyTorch (torch.cuda, torch.npu, ...), which all have the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.devices.api import MemoryStats, UnavailableError

TRACE = "trace.json"


class TorchRuntime:
    """Implements `Runtime`; every call is about the device bound last (the module's current device)."""

    def __init__(
        self,
        device_type: str,
        *,
        visible_devices_variable: str | None = None,
        allocator_variable: str | None = None,
        ray_resource: str | None = None,
    ) -> None:
        self.device_type = device_type
        self.visible_devices_variable = visible_devices_variable
        self.allocator_variable = allocator_variable
        self.ray_resource = ray_resource
        self._index = 0
        self._copies: Any = None

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.device_type)

    def device_count(self) -> int:
        count: int = self._module.device_count()
        return count

    def bind(self, local_rank: int) -> torch.device:
        """`local_rank`'s device, or the only one where the launcher shows each rank its own."""
        count = self.device_count()
        index = 0 if count == 1 else local_rank
        if index >= count:
            name = self.device_type.upper()
            raise UnavailableError(
                f"local rank {local_rank} has no {name} device: {count} are visible\n"
                f"    remedy: start at most {count} ranks on this machine"
            )
        self._module.set_device(index)
        if index != self._index:
            self._index, self._copies = index, None
        return torch.device(self.device_type, index)

    def synchronize(self) -> None:
        self._module.synchronize()

    def memory(self) -> MemoryStats:
        module = self._module
        _, total = module.mem_get_info()
        return MemoryStats(allocated=module.memory_allocated(), peak=module.max_memory_allocated(), total=total)

    def reset_peak_memory(self) -> None:
        self._module.reset_peak_memory_stats()

    def limit_memory(self, fraction: float) -> None:
        self._module.set_per_process_memory_fraction(fraction)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def rng_state(self) -> Tensor:
        state: Tensor = self._module.get_rng_state()
        return state

    def set_rng_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state)

    def upload(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """As `Runtime.upload`, by way of pinned memory on a stream of its own. From any thread."""
        module, device = self._module, torch.device(self.device_type, self._index)
        module.set_device(self._index)  # of this thread, which may be new: leaving a stream goes back to its device
        if self._copies is None:
            self._copies = module.Stream(device)
        pinned = [tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in tensors]
        with module.stream(self._copies):
            copies = [tensor.to(device, non_blocking=True) for tensor in pinned]
            done = self._copies.record_event()

        def wait() -> list[Tensor]:
            current = module.current_stream()
            current.wait_event(done)
            for copy in copies:
                copy.record_stream(current)
            return copies

        return wait

    @contextmanager
    def profile(self, directory: Path) -> Iterator[None]:
        """As `Runtime.profile`: a Chrome trace, `trace.json`."""
        with torch_profile(directory):
            yield
            self.synchronize()


@contextmanager
def torch_profile(directory: Path) -> Iterator[None]:
    """What PyTorch's own profiler sees of the host, and of the devices that it knows."""
    activities = torch.profiler.supported_activities()  # type: ignore[no-untyped-call]
    with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
        yield
    directory.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(directory / TRACE))
