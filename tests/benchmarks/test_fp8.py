"""The benchmark of FP8: on the CPU it compares numbers and takes no times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchspec.core.registry import devices

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fp8.py"
SMALL = (
    "--tokens", "96", "--hidden", "64", "--intermediate", "96", "--heads", "4", "--kv-heads", "2",
    "--vocabulary", "320", "--draft-vocabulary", "160", "--unroll", "2",
)  # fmt: skip


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARK.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_nothing_emulated_is_timed() -> None:
    ran = run("--device", "cpu", *SMALL)
    assert ran.returncode == 1
    assert "fp8 is emulated on cpu" in ran.stderr
    assert "nothing was timed" in ran.stderr
    assert not ran.stdout


@pytest.mark.skipif(devices().spec("cuda").probe().ok, reason="a GPU is here")
def test_without_a_gpu_it_says_why() -> None:
    ran = run(*SMALL)
    assert ran.returncode == 1
    assert "cuda" in ran.stderr.lower()
    assert "Traceback" not in ran.stderr


def test_numbers_are_compared(tmp_path: Path) -> None:
    ran = run("--device", "cpu", "--check", *SMALL, "--json", str(tmp_path / "fp8.json"))
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "fp8.json").read_text())
    assert (found["fp8"], found["steps"]) == ("emulated", [])
    for row in found["checked"]["relative to bf16"].values():
        assert 0.01 < row["gradients"] < 0.25
