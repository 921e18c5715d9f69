"""Binding, memory, random state and profiling of Ascend NPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchspec.devices._torch_runtime import TorchRuntime
from torchspec.devices.ascend import _ops


class AscendRuntime(TorchRuntime):
    """`torch.npu`, which has the names of `torch.cuda`."""

    def __init__(self) -> None:
        super().__init__(
            "npu",
            visible_devices_variable="ASCEND_RT_VISIBLE_DEVICES",
            allocator_variable="PYTORCH_NPU_ALLOC_CONF",
            ray_resource="NPU",
        )

    @contextmanager
    def profile(self, directory: Path) -> Iterator[None]:
        """As `Runtime.profile`, by the vendor's profiler: PyTorch's own does not see the NPU."""
        with _ops.profile(directory):
            yield
            self.synchronize()
