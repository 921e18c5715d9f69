"""The matrix tells the truth: what is skipped and why, what was promised, what showed nothing, what did not run."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def load(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cells", root / "ci" / "cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """ci/cells.py with its records in an empty place, on a machine without any hardware."""
    module = load(ROOT)
    monkeypatch.setattr(module, "RECORDS", tmp_path / "records")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PROMISED", raising=False)
    monkeypatch.setattr(module, "tree", lambda: "abc")
    return module


def command(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PROMISED": "", **variables}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


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
    cells.lacks_cuda.cache_clear()
    fake.write_text('#!/bin/sh\necho "couldn\'t communicate with the NVIDIA driver"; exit 9\n')
    assert cells.lacks("cuda-hf") == "no NVIDIA GPU: couldn't communicate with the NVIDIA driver"


@pytest.mark.parametrize(
    ("script", "said"),
    [("#!/bin/sh\n/bin/sleep 20\n", "did not answer within 0 s"), ("#!/nowhere\n", "does not start")],
    ids=["hangs", "does not start"],
)
def test_an_nvidia_smi_that_does_not_answer(
    cells: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(script)
    fake.chmod(0o755)
    monkeypatch.setattr(cells, "PROBE_SECONDS", 0.3)
    assert said in cells.lacks("cuda-hf")


def test_what_was_promised(cells: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(cells.broken_promise(cell) for cell in cells.CELLS)
    monkeypatch.setattr(cells, "lacks_npu", lambda: "no Ascend NPU under /dev")
    monkeypatch.setenv("PROMISED", "npu")
    assert [cell for cell in cells.CELLS if cells.broken_promise(cell)] == ["npu-hf", "npu-vllm", "npu-sglang"]
    assert cells.broken_promise("npu-hf") == "promised (PROMISED), but no Ascend NPU under /dev"


def test_promised_hardware_is_no_promise_of_an_engine(cells: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "lacks_npu", lambda: "")
    monkeypatch.setenv("PROMISED", "npu")
    assert "VLLM_ASCEND_PYTHON" in cells.lacks("npu-vllm")
    assert cells.broken_promise("npu-vllm") == ""


def test_hardware_is_looked_for_once(cells: ModuleType, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/log; exit 9\n")
    fake.chmod(0o755)
    cells.rows()
    assert (tmp_path / "log").read_text() == "asked\n"


def test_records_are_of_one_tree_and_the_rest_did_not_run(cells: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cells.record("lint", "PASS", "all commands succeeded", 12.3)
    cells.record("cuda-hf", "SKIP", "no NVIDIA GPU")
    status = {row["cell"]: row["status"] for row in cells.rows()}
    assert status == dict.fromkeys(cells.CELLS, "NOT RUN") | {"lint": "PASS", "cuda-hf": "SKIP"}
    monkeypatch.setattr(cells, "tree", lambda: "def")
    assert {row["status"] for row in cells.rows()} == {"NOT RUN"}


def test_without_git_only_the_present_run_has_records(cells: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "tree", lambda: "")
    cells.record("lint", "PASS", "all commands succeeded")
    ended = json.loads((cells.RECORDS / "lint.json").read_text())["ended"]
    assert {row["status"] for row in cells.rows()} == {"NOT RUN"}
    assert {row["status"] for row in cells.rows(since=ended + 1)} == {"NOT RUN"}
    assert {row["cell"] for row in cells.rows(since=ended - 1) if row["status"] == "PASS"} == {"lint"}


@pytest.mark.parametrize("left", ['{"cell": "lint", "sta', "[]", "{}"])
def test_a_record_that_cannot_be_read_is_none(cells: ModuleType, left: str) -> None:
    cells.record("lint", "PASS", "all commands succeeded")
    (cells.RECORDS / "lint.json").write_text(left)
    (row,) = (row for row in cells.rows() if row["cell"] == "lint")
    assert (row["status"], row["text"]) == ("NOT RUN", "its record cannot be read")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository of ci/ alone, with its ignored .tox/."""
    root = tmp_path / "checkout"
    (root / "ci").mkdir(parents=True)
    for name in ("ci/cells.py", "ci/matrix", ".gitignore", "toxfile.py"):
        shutil.copy(ROOT / name, root / name)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "first")):
        assert command(*git, *words, cwd=root).returncode == 0
    return root


def key(root: Path) -> str:
    return str(load(root).tree())


def test_every_change_is_another_tree(checkout: Path) -> None:
    """Edited twice, and files that git does not know; not what it ignores."""
    keys = [key(checkout)]
    for name, content in (("toxfile.py", "1"), ("toxfile.py", "2"), ("new.py", "1"), ("new.py", "2"), ("b", "")):
        (checkout / name).write_text(content)
        keys.append(key(checkout))
    assert len(set(keys)) == len(keys)
    assert all(keys)
    (checkout / ".tox").mkdir()
    (checkout / ".tox" / "log").write_text("ignored")
    assert key(checkout) == keys[-1]
    (checkout / "b").unlink()
    (checkout / "new.py").unlink()
    assert command("git", "checkout", "-q", ".", cwd=checkout).returncode == 0
    assert key(checkout) == keys[0]


def test_without_git_there_is_no_key_and_no_traceback(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(checkout / ".git", tmp_path / "moved")
    assert key(checkout) == ""
    shutil.move(tmp_path / "moved", checkout / ".git")
    assert key(checkout)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert key(checkout) == ""


@pytest.mark.parametrize(
    ("words", "promised", "said"),
    [
        (("cpu",), "", "no such cell: cpu; choose from cpu-hf, "),
        (("lint", "py311", "docs-cpu"), "", "no such cell: py311, docs-cpu; "),
        (("lint",), "gpu", "PROMISED names gpu; choose from cpu, cuda, npu"),
    ],
)
def test_what_the_matrix_refuses(words: tuple[str, ...], promised: str, said: str) -> None:
    """tox would make an environment of any combination of factors, run nothing in it and succeed."""
    done = command(str(ROOT / "ci" / "matrix"), *words, PROMISED=promised)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert not done.stdout


def test_only_the_cells_that_were_asked_for_are_judged(cells: ModuleType) -> None:
    for cell, status in (("docs", "PASS"), ("cpu-hf", "FAIL"), ("toyhw", "PART")):
        cells.record(cell, status, "as told")
    asked = [(), ("docs",), ("docs", "toyhw"), ("docs", "cpu-hf"), ("docs", "lint"), ("cpu",)]
    assert [cells.main(["table", *words]) for words in asked] == [1, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(("body", "code"), [("assert True", 0), ("pytest.skip('absent')", 1)])
def test_a_suite_that_skipped_everything_fails(cells: ModuleType, tmp_path: Path, body: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it():\n    {body}\n")
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path), f"--junitxml={junit}", "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert cells.main(["counted", str(junit)]) == code


@pytest.mark.parametrize("content", [None, "", "<testsuite tests='1'", "<testsuite tests='many'/>"])
def test_a_junit_file_that_cannot_be_read(
    cells: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    junit = tmp_path / "junit.xml"
    if content is not None:
        junit.write_text(content)
        assert cells.findings(tmp_path) == "its tests were not counted"
    assert cells.main(["counted", str(junit)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {junit} is no JUnit file")


def test_the_verdicts_are_kept(cells: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "device.json")
    assert cells.main(["conformance", out, "--", "--conformance", "cpu", "--topics", "spec"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("PASS  spec: what is declared")
    assert told[-1].startswith("device cpu CONFORMS AS FAR AS IT WAS CHECKED")
    (tmp_path / "junit.xml").write_text('<testsuites><testsuite tests="3" skipped="1"/></testsuites>')
    assert cells.findings(tmp_path).startswith("2 passed, 0 failed, 1 skipped; device cpu CONFORMS AS FAR AS")


def test_a_doctor_without_a_verdict_fails(cells: ModuleType, tmp_path: Path) -> None:
    assert cells.main(["conformance", str(tmp_path / "device.json"), "--", "--conformance", "cpux"]) == 2
    assert cells.findings(tmp_path) == "no verdict on the device"


def test_what_tox_records(checkout: Path) -> None:
    """With the plugin itself, in an environment that needs no download."""
    tox = shutil.which("tox", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tox is None:
        pytest.skip("tox is not installed")
    (checkout / "deps.txt").write_text("")
    (checkout / "suite.py").write_text(
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[1], 'junit.xml').write_text('<testsuite tests=\"1\"/>')\n"
        "sys.exit(3 if '-x' in sys.argv else 0)\n"
    )
    (checkout / "tox.ini").write_text(
        "[tox]\nno_package = true\n[testenv:docs]\ndeps = -r deps.txt\n"
        "commands = python suite.py {env_tmp_dir} {posargs}\n"
    )
    one = "1 passed, 0 failed, 0 skipped"
    runs = {
        ("run", "-e", "docs"): ("PASS", one),
        ("run", "-e", "docs", "--", "-k", "one two"): ("PART", f"only with: -k 'one two'; {one}"),
        ("run", "-e", "docs", "--", "-x"): ("FAIL", f"ended with code 3; only with: -x; {one}"),
        ("run", "-e", "docs", "--notest"): ("NOT RUN", ""),
        ("exec", "-e", "docs", "--", "python", "-c", ""): ("NOT RUN", ""),
    }
    for words, expected in runs.items():
        done = command(tox, *words, cwd=checkout)
        assert done.returncode == (3 if "-x" in words else 0), done.stdout + done.stderr
        (row,) = (row for row in load(checkout).rows() if row["cell"] == "docs")
        assert (row["status"], row["text"]) == expected
        (checkout / ".tox" / "cells" / "docs.json").unlink(missing_ok=True)


def test_the_workflow_runs_every_cell_and_no_foreign_code_on_machines_that_are_kept(cells: ModuleType) -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for job in yaml.safe_load(text)["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest" or "github.event_name != 'pull_request'" in job["if"]
        runs_cells = any("ci/matrix" in step.get("run", "") for step in job["steps"])
        assert runs_cells == any(step.get("uses", "").startswith("actions/upload-artifact") for step in job["steps"])
    assert set(cells.CELLS) <= set(re.findall(r"[a-z]+(?:-[a-z]+)*", text))


def test_the_documentation_holds() -> None:
    """Links, anchors, and the options in its command lines."""
    command = [sys.executable, "-P", str(ROOT / "ci" / "check_docs.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
