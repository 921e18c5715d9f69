"""The suite as pytest runs it: `pytest --pyargs torchspec.backends.conformance --backend NAME`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torchspec.backends.conformance import CHECKS, Setting, Subject
from torchspec.core import registry, settings
from torchspec.core.conformance.checks import Check, NotHereError
from torchspec.core.models.target_spec import resolve_target


@pytest.fixture(scope="module")
def subject(pytestconfig: pytest.Config) -> Iterator[Subject]:
    name = pytestconfig.getoption("--backend", None)
    assert name, "which engine? --backend NAME"
    device, _ = registry.choose_device(pytestconfig.getoption("--device"), settings.default_device())
    made = Subject(Setting(name=name, target=str(resolve_target(pytestconfig.getoption("--target"))), device=device))
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_conformance(check: Check[Subject], subject: Subject) -> None:
    try:
        print(check.run(subject))
    except NotHereError as missing:
        pytest.skip(str(missing))
