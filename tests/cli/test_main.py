"""The front door: help, exit codes, errors as text, options made from schemas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchspec import cli
from torchspec.cli import COMMANDS, main
from torchspec.core import registry
from torchspec.core.errors import DataError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as exit_:  # argparse's --help
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def fields(text: str) -> list[str]:
    return [line.split(":")[0].removeprefix("  - ") for line in text.splitlines() if line.startswith("  - ")]


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_names_every_command(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    for name, what in COMMANDS.items():
        assert name in out
        assert what in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: torchspec {command}")


def test_help_of_train_lists_every_setting(run: Run) -> None:
    out = run("train", "--help")[1]
    for word in (
        "train.lr=",
        "data.max_length=",
        "draft.unroll=7",
        "eval.samples=",
        "--nproc",
        "--dry-run",
        "--config",
    ):
        assert word in out


def test_the_front_door_opens_fast() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torchspec", "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 1.0
    assert "quickstart" in done.stdout


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("torchspec 0.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("trian",), "did you mean train?"),
        (("--hepl",), "did you mean --help?"),
        (("doctor", "--jsn"), "did you mean --json?"),
        (("doctor", "surplus"), "surplus: no such argument"),
        (("report",), "RUN_DIR"),
        (("eval", "--draft-length"), "--draft-length: expected one argument"),
        (("prepare", "--output", f"{__file__}/x"), "is a file, not a directory"),
    ],
)
def test_usage_errors_are_answered_and_exit_2(run: Run, words: tuple[str, ...], says: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


def test_every_wrong_option_of_a_command_is_reported_at_once(run: Run) -> None:
    code, _, err = run(
        "eval", "--draft-lenth", "3", "--samples", "0", "--temperature=-1", "--dtype", "bf16", "--sweep", "x"
    )
    assert code == 2
    assert sorted(fields(err)) == [
        "--data", "--draft", "--draft-lenth", "--dtype", "--samples", "--sweep", "--target", "--temperature",
    ]  # fmt: skip
    assert "did you mean --draft-length?" in err
    assert "choices: auto, float32, bfloat16, float16" in err


def test_every_wrong_word_of_train_is_reported_at_once(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  batchsize: 3\n")
    code, _, err = run(
        "train", "--devise", "cpu", "--backend", "hg", "--data", "nowhere.jsonl", "train.lr=fast",
        "--config", str(file), "--nproc", "none", "stray", "draft.unrol=3",
    )  # fmt: skip
    assert code == 2
    assert sorted(fields(err)) == [
        "--devise", "--nproc", "backend", "data.train", "draft.unrol", "output", "stray", "target.path",
        "train.batchsize", "train.lr",
    ]  # fmt: skip
    assert "run.yaml:2" in err
    assert "did you mean draft.unroll?" in err
    assert "Traceback" not in err


def test_settings_may_follow_a_list_of_files(run: Run) -> None:
    _, _, err = run("train", "--data", "a.jsonl", "b.jsonl", "train.lr=-1", "--output", "o")
    assert fields(err).count("data.train") == 2, "both files, and only they, are looked for"
    assert "train.lr: must be a number > 0" in err


def test_an_unavailable_device_is_refused_with_its_reason(run: Run, tmp_path: Path) -> None:
    missing = next(name for name in registry.devices().names() if not registry.devices().spec(name).probe().ok)
    data = tmp_path / "a.jsonl"
    data.write_text("{}\n")
    code, _, err = run(
        "train", "--target", "embedded", "--data", str(data), "--output", str(tmp_path / "o"), "--device", missing
    )
    assert code == 2
    assert registry.devices().spec(missing).probe().reason in err
    assert not (tmp_path / "o").exists()


def test_report_of_no_run(run: Run, tmp_path: Path) -> None:
    code, _, err = run("report", str(tmp_path))
    assert code == 1
    assert "not a run directory" in err


def test_doctor_lists_every_adapter(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    for kind, known in (("devices", registry.devices()), ("backends", registry.backends())):
        assert [entry["name"] for entry in found[kind]] == list(known.names())
        for entry in found[kind]:
            assert entry["registered_by"] == "torchspec"
            assert entry["available"] or (entry["reason"] and entry["remedy"]), entry
    assert {entry["name"]: entry["available"] for entry in found["devices"]}["cpu"] is True
    assert {entry["name"]: entry.get("fp8") for entry in found["devices"]}["cpu"] == "emulated"
    assert [entry["name"] for entry in found["trackers"]] == list(registry.trackers().names())
    assert found["packages"]["torch"]
    code, out, _ = run("doctor")
    assert code == 0
    assert all(name in out for name in (*registry.devices().names(), *registry.backends().names(), "eagle3"))


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("every row is bad"), 1, "every row is bad"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/runs/a/x"), 1, "No space left on device: /runs/a/x"),
        (
            MemoryError("the GPU has no 8.0 MB left"),
            1,
            "out of memory: the GPU has no 8.0 MB left\n    remedy: smaller",
        ),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "out of memory: CUDA out of memory.\n    remedy: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 1, "out of memory: DefaultCPUAllocator"),
        (RuntimeError("oh"), 70, "defect of torchspec: RuntimeError: oh"),
        (ZeroDivisionError("oh"), 70, "defect of torchspec: ZeroDivisionError: oh"),
    ],
)
def test_errors_become_text_and_exit_codes(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    def failing(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", failing)
    got, out, err = run("train")
    assert (got, out) == (code, "")
    assert says in err
    assert "Traceback" not in err
    got, _, err = run("train", "--traceback")
    assert got == code
    assert "Traceback" in err


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "torchspec", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
