"""The checks in the order in which they are made; those that use the engine in the same way stand together."""

from __future__ import annotations

from torchspec.backends.conformance.capture import CAPTURE
from torchspec.backends.conformance.facts import ENDS, FACTS
from torchspec.backends.conformance.subject import Subject
from torchspec.backends.conformance.text import TEXT
from torchspec.backends.conformance.training import TRAINING
from torchspec.core.conformance.checks import Check

CHECKS: tuple[Check[Subject], ...] = (*FACTS, *CAPTURE, *TEXT, *ENDS, *TRAINING)

TOPICS = tuple(dict.fromkeys(check.name.partition(":")[0] for check in CHECKS))
