"""The suite as pytest has it made, apart: `pytest --pyargs torchspec.backends.conformance --backend NAME`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from torchspec.backends.conformance import CHECKS, Subject
from torchspec.core.conformance.checks import Check

SUITE = "torchspec.backends.conformance"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_conformance(check: Check[Subject], make: Callable[[str], None]) -> None:
    make(check.name)
