"""The suite as pytest runs it: `pytest --pyargs torchspec.devices.conformance --device NAME`."""

from __future__ import annotations

from functools import cache

import pytest

from torchspec.core.conformance.checks import Check, NotHereError
from torchspec.devices.conformance import CHECKS, Subject, subject_of


@cache
def _subject(name: str) -> Subject:
    return subject_of(name)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_conformance(check: Check[Subject], pytestconfig: pytest.Config) -> None:
    name = pytestconfig.getoption("--device", None)
    assert name, "which device? --device NAME"
    try:
        print(check.run(_subject(name)))
    except NotHereError as missing:
        pytest.skip(str(missing))
