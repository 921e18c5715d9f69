"""The suite as pytest has it made, apart: `pytest --pyargs torchspec.devices.conformance --device NAME`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from torchspec.core.conformance.checks import Check
from torchspec.devices.conformance import CHECKS, Subject

SUITE = "torchspec.devices.conformance"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_conformance(check: Check[Subject], make: Callable[[str], None]) -> None:
    make(check.name)
