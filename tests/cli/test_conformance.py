"""`torchspec doctor --conformance`: a table, a verdict, exit codes, and what it refuses to begin."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchspec.cli import main
from torchspec.cli.conformance import verdict
from torchspec.core.conformance.checks import Result

SUITE = b"torchspec.devices.conformance"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "torchspec", "doctor", *words],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_device() -> None:
    done = command("--conformance", "cpu", "--topics", "spec", "ops")
    assert done.returncode == 0, done.stderr
    assert "adapter API 1" in done.stdout
    assert "registered by torchspec" in done.stdout
    assert "spec: what is declared" in done.stdout
    assert "rms norm" in done.stdout
    assert "ops: distillation tile" in done.stderr  # as it begins
    assert "device cpu CONFORMS AS FAR AS IT WAS CHECKED (only some topics were checked; 7 passed" in done.stdout


def test_an_engine_as_json() -> None:
    done = command("--conformance-backend", "hf", "--device", "cpu", "--topics", "spec", "target", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [(each["check"], each["status"]) for each in told["checks"]] == [
        ("spec: what is declared", "PASS"),
        ("target: described as its files do", "PASS"),
    ]
    assert told["backend"] == "hf"
    assert told["topics"] == ["spec", "target"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--conformance", "cpux"), "did you mean cpu?"),
        (("--conformance", "cpu", "--topics", "atention"), "no check is about it (got 'atention')"),
        (("--conformance-backend", "hff"), "did you mean hf?"),
        (("--conformance-backend", "hf", "--target", "nowhere"), "nowhere"),
        (("--conformance", "cpu", "--conformance-backend", "hf"), "one adapter at a time"),
        (("--topics", "ops"), "--topics: is of the checks of an adapter, and none is named"),
        (("--dtype", "bfloat16"), "--dtype: is of a target"),
        (("--conformance-backend", "hf", "--thinking", "off"), "--thinking: no check is made with it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_checked(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert said in capsys.readouterr().err


def test_all_that_does_not_belong_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--target", "x", "--dtype", "bfloat16", "--device", "cuda", "--engine-tensor-parallel", "2")
    assert main(["doctor", "--conformance", "cpu", *words]) == 2
    said = capsys.readouterr().err
    assert all(f"- {flag}: " in said for flag in words[::2]), said
    assert "4 configuration errors" in said


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes where Linux has them")
def test_sigterm_ends_what_makes_the_checks() -> None:
    asked = [sys.executable, "-P", "-m", "torchspec", "doctor", "--conformance", "cpu", "--topics", "ops"]
    doctor = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    children = Path(f"/proc/{doctor.pid}/task/{doctor.pid}/children")
    while not (making := [each for each in children.read_text().split() if SUITE in _command(each)]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    doctor.terminate()
    assert doctor.wait(60) == 128 + signal.SIGTERM
    while left := [each for each in making if SUITE in _command(each)]:  # a zombie has no command line
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _command(process: str) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.parametrize(
    ("statuses", "part", "said"),
    [
        (("PASS", "PASS"), False, "device x CONFORMS (2 passed, 0 failed, 0 skipped)"),
        (("PASS", "SKIP"), False, "device x CONFORMS AS FAR AS IT WAS CHECKED (1 passed, 0 failed, 1 skipped)"),
        (("PASS",), True, "device x CONFORMS AS FAR AS IT WAS CHECKED (only some topics were checked; 1 passed"),
        (("PASS", "FAIL"), True, "device x DOES NOT CONFORM (1 passed, 1 failed, 0 skipped)"),
    ],
)
def test_the_verdict(statuses: tuple[str, ...], part: bool, said: str) -> None:
    results = [Result(check="a: b", status=status, text="", seconds=0.0) for status in statuses]  # type: ignore[arg-type]
    assert verdict("device", "x", results, part=part).startswith(said)
