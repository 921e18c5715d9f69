"""The checks in the order in which they are made: what the others stand on comes first."""

from __future__ import annotations

from torchspec.core.conformance.checks import Check
from torchspec.devices.conformance.attention import ATTENTION
from torchspec.devices.conformance.collectives import COLLECTIVES
from torchspec.devices.conformance.module import MODULE
from torchspec.devices.conformance.ops import OPS
from torchspec.devices.conformance.runtime import LIMITS, RUNTIME
from torchspec.devices.conformance.sharing import SHARING
from torchspec.devices.conformance.subject import Subject
from torchspec.devices.conformance.training import TRAINING

CHECKS: tuple[Check[Subject], ...] = (
    *RUNTIME,
    *MODULE,
    *ATTENTION,
    *OPS,
    *SHARING,
    *LIMITS,
    *COLLECTIVES,
    *TRAINING,
)

TOPICS = tuple(dict.fromkeys(check.name.partition(":")[0] for check in CHECKS))
