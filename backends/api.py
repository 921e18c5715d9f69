"""The public adapter API for target engines, version `API_VERSION`.

`read_target_spec(path, trust_remote_code=False)` gives the facts that `describe` returns, and
`running_dtype(configured, stored, device)` the precision that `dtype="auto"` stands for. Built-in engines also read a
target's weights through `torchspec.core.models`, which is not part of the API.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchspec.core.errors import ConfigError, Problem, TargetError, TorchspecError, UnavailableError
from torchspec.core.interfaces.device import API_VERSION, Availability, Device
from torchspec.core.interfaces.engine import (
    ENGINE_CAPABILITIES,
    CaptureRequest,
    DecodeSession,
    EngineOptions,
    EngineProcess,
    EngineSpec,
    ImageReference,
    Images,
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

if TYPE_CHECKING:
    from torchspec.core.models.target_spec import read_target_spec, running_dtype

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
    "ImageReference",
    "Images",
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
    "read_target_spec",
    "running_dtype",
]


def __getattr__(name: str) -> object:
    """What reads a target, imported when first used: it brings transformers, which an engine's environment may lack."""
    if name in ("read_target_spec", "running_dtype"):
        from torchspec.core.models import target_spec

        return getattr(target_spec, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
