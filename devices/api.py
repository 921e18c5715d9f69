"""The public adapter API for hardware, version `API_VERSION`. Adapters import nothing else of core."""

from torchspec.core.errors import TorchspecError, UnavailableError
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
    SharedMemory,
)
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.distillation import (
    LOG_TERMS,
    SOFT_TERMS,
    Label,
    TilePairs,
    TileTeacher,
    TileTerms,
)
from torchspec.core.settings import Launch, launch, malloc_is_tuned

__all__ = [
    "API_VERSION",
    "LOG_TERMS",
    "SOFT_TERMS",
    "Attention",
    "Availability",
    "Communication",
    "Device",
    "DeviceSpec",
    "FusedOps",
    "Label",
    "Launch",
    "MaskSpec",
    "MemoryStats",
    "Runtime",
    "SharedMemory",
    "TilePairs",
    "TileTeacher",
    "TileTerms",
    "TorchspecError",
    "UnavailableError",
    "launch",
    "malloc_is_tuned",
]
