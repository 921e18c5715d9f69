"""The public adapter API for target engines, version `API_VERSION`.

Built-in engines may also read a target's files through `torchspec.core.models`, which is not part of it.
"""

from torchspec.core.errors import ConfigError, Problem, TargetError, TorchspecError, UnavailableError
from torchspec.core.interfaces.device import API_VERSION, Availability, Device
from torchspec.core.interfaces.engine import (
    ENGINE_CAPABILITIES,
    CaptureRequest,
    DecodeSession,
    EngineOptions,
    EngineProcess,
    EngineSpec,
    Prefill,
    ServedText,
    ServingCounters,
    ServingEngine,
    StartedEngine,
    StepOutput,
    StreamedEngine,
    TargetEngine,
    TargetSpec,
)
from torchspec.core.interfaces.features import (
    Captured,
    Features,
    FeatureSink,
    FeatureStore,
    NormState,
    Quarantined,
    RecordRef,
)

__all__ = [
    "API_VERSION",
    "ENGINE_CAPABILITIES",
    "Availability",
    "CaptureRequest",
    "Captured",
    "ConfigError",
    "DecodeSession",
    "Device",
    "EngineOptions",
    "EngineProcess",
    "EngineSpec",
    "FeatureSink",
    "FeatureStore",
    "Features",
    "NormState",
    "Prefill",
    "Problem",
    "Quarantined",
    "RecordRef",
    "ServedText",
    "ServingCounters",
    "ServingEngine",
    "StartedEngine",
    "StepOutput",
    "StreamedEngine",
    "TargetEngine",
    "TargetError",
    "TargetSpec",
    "TorchspecError",
    "UnavailableError",
]
