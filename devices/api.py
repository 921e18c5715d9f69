"""The public adapter API for hardware, version `API_VERSION`. Adapters import nothing else of core."""

from torchspec.core.interfaces.device import (
    API_VERSION,
    Attention,
    Availability,
    Communication,
    Device,
    DeviceSpec,
    FusedOps,
    MemoryStats,
    Runtime,
)
from torchspec.core.interfaces.mask import MaskSpec

__all__ = [
    "API_VERSION",
    "Attention",
    "Availability",
    "Communication",
    "Device",
    "DeviceSpec",
    "FusedOps",
    "MaskSpec",
    "MemoryStats",
    "Runtime",
]
