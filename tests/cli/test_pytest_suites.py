"""`pytest --pyargs torchspec.devices.conformance`, and the engines': each check has its own result, whatever breaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# The CPU, whose operations break in the ways that take a process with them.
ADAPTER = """
import os, signal
from dataclasses import replace
from torchspec.devices.api import FusedOps
from torchspec.devices.cpu import SPEC as CPU

class Ops(FusedOps):
    def rms_norm(self, x, weight, eps):
        os.kill(os.getpid(), signal.SIGSEGV)

def load():
    return replace(CPU.load(), name="crashing", ops=Ops())

def refuse():
    raise OSError("no licence")

SPEC = replace(CPU, name="crashing", load=load)
REFUSING = replace(CPU, name="refusing", load=refuse)
"""


def suite(room: str, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    info = place / "crashing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crashing\nVersion: 1.0\n")
    points = "[torchspec.devices]\ncrashing = crashing:SPEC\nrefusing = crashing:REFUSING\n"
    (info / "entry_points.txt").write_text(points)
    (place / "crashing.py").write_text(ADAPTER)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--pyargs"]
    return subprocess.run(
        [*command, f"torchspec.{room}.conformance", *words],
        cwd=place, env={**os.environ, "PYTHONPATH": str(place)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def test_a_crash_fails_one_check(tmp_path: Path) -> None:
    done = suite("devices", tmp_path, "--device", "crashing", "-k", "spec or rms or swiglu")
    assert "PASSED test_device.py::test_conformance[spec: what is declared]" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_device.py::test_conformance[ops: rms norm and its gradients]" in done.stdout
    assert "the process ended with SIGSEGV" in done.stdout
    assert "PASSED test_device.py::test_conformance[ops: swiglu and its gradients]" in done.stdout
    assert "1 failed, 2 passed" in done.stdout


def test_a_device_that_does_not_load(tmp_path: Path) -> None:
    done = suite("devices", tmp_path, "--device", "refusing", "-k", "spec or swiglu")
    assert "loading: OSError: no licence" in done.stdout, done.stdout + done.stderr
    assert "2 failed" in done.stdout


def test_an_engine(tmp_path: Path) -> None:
    done = suite("backends", tmp_path, "--backend", "hf", "--device", "cpu", "-k", "spec or described")
    assert "2 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("room", "words", "said"),
    [
        ("devices", (), "which device? --device NAME"),
        ("devices", ("--device", "cpux"), "--device: no device of this name is registered (got 'cpux')"),
        ("backends", (), "which engine? --backend NAME"),
        ("backends", ("--backend", "hf", "--device", "cpu", "--target", "nowhere"), "--target: "),
    ],
)
def test_what_is_wrong_with_the_options_is_told_once(
    room: str, words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = suite(room, tmp_path, *words)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.count(said) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
