"""pytest options of the conformance suites, when they are what is run: an option of ours in other people's test runs
could only be in the way of theirs.

    pytest --pyargs torchspec.devices.conformance --device NAME
    pytest --pyargs torchspec.backends.conformance --backend NAME [--target DIRECTORY] [--device NAME]
"""

from __future__ import annotations

import pytest

DEVICES, BACKENDS = "torchspec.devices.conformance", "torchspec.backends.conformance"
NAMED = pytest.StashKey[list[str]]()
"""Of a configuration: the suites that are run."""


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    suites = [suite for suite in (DEVICES, BACKENDS) if any(suite in word.replace("/", ".") for word in args)]
    if not suites:
        return
    group = parser.getgroup("torchspec")
    group.addoption("--device", help="registered device to put through its contract's checks, or to run the engine on")
    group.addoption("--backend", help="registered engine to put through its contract's checks")
    group.addoption("--target", default="embedded", help="target of the engine; default: the one that ships")
    early_config.stash[NAMED] = suites
    early_config.pluginmanager.import_plugin("torchspec.pytest_suites")
