"""The public adapter API for target engines, version `API_VERSION`."""

from torchspec.core.errors import TargetError, UnavailableError
from torchspec.core.interfaces.device import API_VERSION, Availability, Device
from torchspec.core.interfaces.engine import (
    CaptureRequest,
    DecodeSession,
    EngineOptions,
    EngineSpec,
    Prefill,
    StepOutput,
    TargetEngine,
    TargetSpec,
)
from torchspec.core.interfaces.features import Features, FeatureSink, NormState, RecordRef

__all__ = [
    "API_VERSION",
    "Availability",
    "CaptureRequest",
    "DecodeSession",
    "Device",
    "EngineOptions",
    "EngineSpec",
    "FeatureSink",
    "Features",
    "NormState",
    "Prefill",
    "RecordRef",
    "StepOutput",
    "TargetEngine",
    "TargetError",
    "TargetSpec",
    "UnavailableError",
]
