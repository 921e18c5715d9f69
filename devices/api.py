"""The public adapter API for hardware, version `API_VERSION`. Adapters import nothing else of core."""

from torchspec.core.errors import TorchspecError, UnavailableError
from torchspec.core.interfaces.device import (
    API_VERSION,
    CAPABILITIES,
    Attention,
    Availability,
    Communication,
    Device,
    DeviceSpec,
    Fp8Support,
    FusedOps,
    MemoryStats,
    Multiplexer,
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
from torchspec.core.ops.fp8 import Scaled, emulated_scaled_mm
from torchspec.core.ops.transfer import to_device
from torchspec.core.settings import Launch, attention_kernels, environment_with, is_set, launch, malloc_is_tuned

__all__ = [
    "API_VERSION",
    "CAPABILITIES",
    "LOG_TERMS",
    "SOFT_TERMS",
    "Attention",
    "Availability",
    "Communication",
    "Device",
    "DeviceSpec",
    "Fp8Support",
    "FusedOps",
    "Label",
    "Launch",
    "MaskSpec",
    "MemoryStats",
    "Multiplexer",
    "Runtime",
    "Scaled",
    "SharedMemory",
    "TilePairs",
    "TileTeacher",
    "TileTerms",
    "TorchspecError",
    "UnavailableError",
    "attention_kernels",
    "emulated_scaled_mm",
    "environment_with",
    "is_set",
    "launch",
    "malloc_is_tuned",
    "to_device",
]
