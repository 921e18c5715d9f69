"""A subject that crashes, hangs or prints fails its own check, and no other."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from torchspec.core.conformance.apart import LOADING, run_apart


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> tuple:  # type: ignore[type-arg]
    folder = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")])))
    monkeypatch.syspath_prepend(folder)
    import misbehaving

    yield misbehaving.CHECKS
    del sys.modules["misbehaving"]


def test_every_check_has_its_result(checks: tuple) -> None:  # type: ignore[type-arg]
    began: list[str] = []
    results = list(run_apart("misbehaving", ["it"], checks, start_seconds=60, progress=began.append))
    assert [(result.check, result.status, result.text) for result in results] == [
        ("first: prints", "PASS", "measured with it"),
        ("first: dies", "FAIL", "the process ended with SIGSEGV"),
        ("first: breaks", "FAIL", "seven is not eight"),
        ("first: hangs", "FAIL", "not done within 1 s"),
        ("second: leaves", "FAIL", "the process ended with code 3"),
        ("second: fails", "FAIL", "KeyError: 'no such key'"),
        ("second: is missing", "SKIP", "needs two moons"),
        ("second: prints", "PASS", "measured with it"),
    ]
    assert began == [check.name for check in checks]
    assert "about to fall over" in results[1].where
    assert "misbehaving.py" in results[2].where


def test_a_subject_that_does_not_load(checks: tuple) -> None:  # type: ignore[type-arg]
    (result,) = run_apart("misbehaving", ["none"], checks, start_seconds=60)
    assert (result.check, result.status, result.text) == (LOADING, "FAIL", "OSError: there is no subject")


def test_a_subject_that_takes_too_long_to_load(checks: tuple) -> None:  # type: ignore[type-arg]
    (result,) = run_apart("misbehaving", ["slow"], checks, start_seconds=3)
    assert (result.check, result.status, result.text) == (LOADING, "FAIL", "not done within 3 s")
