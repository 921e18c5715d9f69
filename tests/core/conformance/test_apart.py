"""A subject that crashes, hangs or prints fails its own check, and no other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torchspec.core.conformance import apart
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
        ("second: exits", "FAIL", "SystemExit: enough"),
        ("second: fails", "FAIL", "KeyError: 'no such key'"),
        ("second: is missing", "SKIP", "needs two moons"),
        ("second: prints", "PASS", "measured with it"),
    ]
    assert began == [check.name for check in checks]
    assert "about to fall over" in results[1].where
    assert "misbehaving.py" in results[2].where


@pytest.mark.parametrize(
    ("subject", "said"), [("none", "OSError: there is no subject"), ("exits", "SystemExit: no licence")]
)
def test_a_subject_that_does_not_load(checks: tuple, subject: str, said: str) -> None:  # type: ignore[type-arg]
    (result,) = run_apart("misbehaving", [subject], checks, start_seconds=60)
    assert (result.check, result.status, result.text) == (LOADING, "FAIL", said)


def test_a_subject_that_takes_too_long_to_load(checks: tuple) -> None:  # type: ignore[type-arg]
    (result,) = run_apart("misbehaving", ["slow"], checks, start_seconds=3)
    assert (result.check, result.status, result.text) == (LOADING, "FAIL", "not done within 3 s")


def test_a_process_that_falls_silent_and_stays(checks: tuple, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[type-arg]
    import misbehaving

    monkeypatch.setattr(apart, "_EXIT_SECONDS", 1.0)
    (result,) = run_apart("misbehaving", ["it"], misbehaving.ALONE[:1], start_seconds=60)
    assert (result.status, result.text) == ("FAIL", "the process fell silent, and had not ended 1 s later")


@pytest.mark.skipif(sys.platform != "linux", reason="the system does it on Linux alone")
def test_nothing_outlives_who_asked(checks: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """Killed without a chance to clean up: the process of the checks goes, and what it had tied to itself."""
    asking = (
        "import misbehaving, sys; from torchspec.core.conformance.apart import run_apart\n"
        "list(run_apart('misbehaving', sys.argv[1:], misbehaving.ALONE[1:], start_seconds=60))\n"
    )
    told = tmp_path / "processes"
    asker = subprocess.Popen([sys.executable, "-c", asking, str(told)])
    try:
        _until(lambda: told.exists() and len(told.read_text().split()) == 2)
    finally:
        asker.kill()
        asker.wait()
    for process in told.read_text().split():
        _until(lambda process=process: _ended(int(process)))


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _ended(process: int) -> bool:
    """Gone, or dead and not yet waited for by whoever has inherited it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
