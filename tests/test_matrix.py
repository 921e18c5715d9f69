"""The matrix tells the truth: what is skipped and why, what was promised, what showed nothing, what did not run."""

from __future__ import annotations

import configparser
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """ci/cells.py with its records in an empty place, on a machine without any hardware."""
    spec = importlib.util.spec_from_file_location("cells", ROOT / "ci" / "cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECORDS", tmp_path / "records")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PROMISED", raising=False)
    monkeypatch.setattr(module, "_commit", lambda: "abc")
    return module


def test_tox_has_every_cell_and_no_other(cells: ModuleType) -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "tox.ini")
    listed = []
    for line in parser["tox"]["env_list"].split():
        before, brace, engines = line.rstrip("}").partition("{")
        listed += [before + engine for engine in engines.split(",")] if brace else [line]
    assert tuple(listed) == cells.CELLS


def test_absent_hardware_has_a_reason(cells: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells.Path, "glob", lambda self, pattern: iter(()))
    for cell in cells.CELLS:
        missing = cells.lacks(cell)
        assert bool(missing) is (cell.startswith(("cuda", "npu")) or cell == "toyhw"), (cell, missing)
    assert "nvidia-smi" in cells.lacks("cuda-vllm")
    assert "VLLM_ASCEND_PYTHON" in cells.lacks("npu-vllm")
    assert cells.lacks("toyhw") == "no C++ compiler"


def test_a_gpu_that_nvidia_smi_lists_is_enough(cells: ModuleType, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    fake.chmod(0o755)
    assert cells.lacks("cuda-hf") == ""
    fake.write_text('#!/bin/sh\necho "couldn\'t communicate with the NVIDIA driver"; exit 9\n')
    assert cells.lacks("cuda-hf") == "no NVIDIA GPU: couldn't communicate with the NVIDIA driver"


def test_what_was_promised(cells: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMISED", "npu")
    assert [cell for cell in cells.CELLS if cells.promised(cell)] == ["npu-hf", "npu-vllm", "npu-sglang"]


def test_records_are_of_one_commit_and_the_rest_did_not_run(cells: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cells.record("lint", "PASS", "all commands succeeded", 12.3)
    cells.record("cuda-hf", "SKIP", "no NVIDIA GPU")
    status = {row["cell"]: row["status"] for row in cells.rows()}
    assert status == dict.fromkeys(cells.CELLS, "NOT RUN") | {"lint": "PASS", "cuda-hf": "SKIP"}
    monkeypatch.setattr(cells, "_commit", lambda: "def")
    assert {row["status"] for row in cells.rows()} == {"NOT RUN"}


@pytest.mark.parametrize(("body", "code"), [("assert True", 0), ("pytest.skip('absent')", 1)])
def test_a_suite_that_skipped_everything_fails(tmp_path: Path, body: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it():\n    {body}\n")
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path), f"--junitxml={junit}", "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    counted = [sys.executable, str(ROOT / "ci" / "cells.py"), "counted", str(junit)]
    assert subprocess.run(counted, capture_output=True, check=False).returncode == code


def test_the_documentation_holds() -> None:
    """Links, anchors, and the options in its command lines."""
    command = [sys.executable, "-P", str(ROOT / "ci" / "check_docs.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
