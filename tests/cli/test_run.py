"""One whole life on the command line: plan, train, stop, continue, evaluate, export, generate, report."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

import torchspec
from torchspec.cli import main
from torchspec.core.errors import ConfigError

SMALL = (
    "data.max_length=96",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "draft.unroll=2",
    "draft.vocab_size=64",
)
VALIDATION = ("eval.samples=2", "eval.max_new_tokens=6", "eval.draft_length=2")


def rows(path: Path, count: int, first: int = 0) -> Path:
    words = ["the", "quick", "brown", "fox", "returns", "the", "value", "of", "the", "function"]
    lines = []
    for n in range(first, first + count):
        said = [" ".join(words[(n * k) % 7 :]) for k in (1, 3)]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
        lines.append(json.dumps({"id": f"row{n}", "messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("life")
    rows(directory / "train.jsonl", 24)
    rows(directory / "held_out.jsonl", 6, first=100)
    return directory


Call = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def call(place: Path) -> Iterator[Call]:
    """Run the command line in this process and that directory, expecting an exit code: (stdout, stderr)."""

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        out, err = io.StringIO(), io.StringIO()
        with chdir(place), redirect_stdout(out), redirect_stderr(err):
            got = main([str(word) for word in words])
        assert got == code, err.getvalue()
        assert "Traceback" not in err.getvalue()
        return out.getvalue(), err.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHSPEC_CACHE", str(place / "cache"))
        yield run


def start(place: Path, *words: object, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A process of its own, for signals and ranks; `before`: the module, with arguments, that starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", *before, "torchspec", *map(str, words)],
        cwd=place,
        env={**os.environ, "TORCHSPEC_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(place: Path, call: Call, tiny_target: Path) -> Path:
    """A finished run with validation: 24 steps, checkpoints, draft, report."""
    file = place / "run.yaml"
    file.write_text("train:\n  lr: 2e-3\n  epochs: 4\n")
    call(
        "train", "--config", file, "--target", tiny_target, "--data", "train.jsonl", "--validation", "held_out.jsonl",
        "--device", "cpu", "--output", "run", *SMALL, *VALIDATION,
    )  # fmt: skip
    return place / "run"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_plan_is_printed_and_nothing_is_written(place: Path, call: Call, tiny_target: Path) -> None:
    words = (
        "train",
        "--dry-run",
        "--target",
        tiny_target,
        "--data",
        "train.jsonl",
        "--output",
        "planned",
        "train.lr=3e-4",
    )
    text = call(*words, *SMALL)[0]
    assert "memory per rank" in text
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["train.lr"]]
    assert line.split() == ["train.lr", "0.0003", "from", "command", "line"]
    plan = json.loads(call(*words, *SMALL, "--json")[0])
    assert plan["steps"]["total"] == 6
    assert not (place / "new").exists()
    assert "--dry-run" in call(*(word for word in words if word != "--dry-run"), "--json", code=2)[1]


def test_the_run_directory_tells_everything(trained: Path) -> None:
    history = metrics(trained)
    assert [row["step"] for row in history if row["kind"] == "train"] == list(range(1, 25))
    assert any(row["kind"] == "validation" and row["acceptance_length"] >= 1.0 for row in history)
    text = (trained / "config.yaml").read_text()
    assert "lr: 0.002  # run.yaml:2" in text
    assert "max_length: 96  # command line" in text
    assert yaml.safe_load(text)["device"] == "cpu"
    assert json.loads((trained / "provenance.json").read_text())["train.batch_size"] == "command line"
    for name in ("report.html", "draft/config.json", "draft/model.safetensors", "checkpoints/best.json"):
        assert (trained / name).is_file(), name


def test_eval_measures_the_exported_draft(place: Path, call: Call, trained: Path, tiny_target: Path) -> None:
    words = (
        "eval",
        "--target",
        tiny_target,
        "--draft",
        trained / "draft",
        "--data",
        "held_out.jsonl",
        "--device",
        "cpu",
    )
    small = ("--samples", 2, "--max-new-tokens", 8, "--draft-length", 3, "--sweep", 1, "--prompt-lookup")
    result = json.loads(call(*words, *small, "--json", "--output", "eval.json")[0])
    assert result == json.loads((place / "eval.json").read_text())
    assert result["acceptance_length"] == pytest.approx(1 + sum(result["acceptance_per_position"]))
    assert len(result["acceptance_per_position"]) == 3
    assert result["lossless"] is True
    assert result["tokens_per_second"] > 0
    assert result["speedup"] == pytest.approx(result["tokens_per_second"] / result["tokens_per_second_draftless"])
    assert [row["draft_length"] for row in result["sweep"]] == [1, 3]
    assert result["best_draft_length"] in (1, 3)
    assert result["prompt_lookup"]["lossless"] is True
    table = call(*words, *small)[0]
    for word in ("acceptance length", "tokens/s", "speed-up", "lossless", "yes", "prompt lookup", "no draft", "greedy"):
        assert word in table


def test_eval_prints_its_figures_when_they_cannot_be_written(
    call: Call, trained: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    words = ("eval", "--target", tiny_target, "--draft", trained / "draft", "--data", "held_out.jsonl", "--json")
    few = ("--device", "cpu", "--samples", 1, "--max-new-tokens", 2, "--draft-length", 1, "--output", "full.json")
    out, err = call(*words, *few, code=1)
    assert json.loads(out)["acceptance_length"] >= 1
    assert "cannot write full.json: No space left on device" in err


def test_export_in_both_layouts_and_from_one_to_the_other(
    place: Path, call: Call, trained: Path, tiny_target: Path
) -> None:
    said = call("export", "--checkpoint", trained, "--format", "vllm", "--output", "spec")[0]
    assert "recorded features" in said
    assert json.loads((place / "spec" / "config.json").read_text())["speculators_model_type"] == "eagle3"
    call("export", "--checkpoint", "spec", "--format", "hf", "--output", "plain", "--target", tiny_target)
    assert (place / "plain" / "model.safetensors").read_bytes() == (
        trained / "draft" / "model.safetensors"
    ).read_bytes()
    assert "--target" in call("export", "--checkpoint", "spec", "--format", "hf", "--output", "plain2", code=2)[1]


def test_generate_counts_and_continues(place: Path, call: Call, tiny_target: Path) -> None:
    words = (
        "generate",
        "--target",
        tiny_target,
        "--data",
        "held_out.jsonl",
        "--output",
        "said.jsonl",
        "--device",
        "cpu",
    )
    first = json.loads(call(*words, "--max-new-tokens", 6, "--json")[0])
    assert (first["read"], first["ok"], first["skipped"]) == (6, 6, 0)
    assert "6 were there already" in call(*words, "--max-new-tokens", 6)[0]


def test_report_is_written_again(call: Call, trained: Path) -> None:
    page = trained / "report.html"
    page.unlink()
    assert call("report", trained)[0].strip() == str(page)
    assert page.is_file()


def test_the_same_from_python(place: Path, tiny_target: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("TORCHSPEC_CACHE", str(place / "cache"))
    sizes = {"batch_size": 4, "micro_batch_size": 2}
    outcome = torchspec.train(
        {
            "target": {"path": tiny_target},
            "data": {"train": ["train.jsonl"], "max_length": 96},
            "output": "from_python",
            "train": {"lr": 2e-3, "epochs": 4, "max_steps": 1, **sizes},
            "draft": {"unroll": 2, "vocab_size": 64},
            "device": "cpu",
        }
    )
    assert (outcome.step, outcome.exit_code) == (1, 0)
    assert metrics(place / "from_python")[0]["loss"] == metrics(trained)[0]["loss"]
    assert json.loads((place / "from_python" / "provenance.json").read_text())["train.lr"] == "python"
    with pytest.raises(ConfigError, match=r"train\.lrr"):
        torchspec.train({"train": {"lrr": 1}})


def test_a_stopped_run_continues_where_it_stopped(place: Path, call: Call, tiny_target: Path, trained: Path) -> None:
    words = (
        "train", "--config", "run.yaml", "--target", tiny_target, "--data", "train.jsonl", "--device", "cpu",
        "--validation", "held_out.jsonl", "--output", "stopped", *SMALL, *VALIDATION,
    )  # fmt: skip
    process = start(place, *words)
    deadline = time.monotonic() + 120
    while not (place / "stopped" / "metrics.jsonl").exists() or not metrics(place / "stopped"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "the same command continues the run" in said
    stopped_at = metrics(place / "stopped")[-1]["step"]
    assert stopped_at < 24
    call(*words)
    first, second = json.loads((place / "stopped" / "environment.json").read_text())["sessions"]
    assert first["command"][1:] == [str(word) for word in words]
    assert (first["from_step"], second["from_step"]) == (0, stopped_at)
    ends = [(each["ended"]["how"], each["ended"]["step"], each["ended"]["cause"]) for each in (first, second)]
    assert ends == [("stopped", stopped_at, "SIGINT"), ("finished", 24, "")]
    assert "Finished at step 24 of 24" in (place / "stopped" / "report.html").read_text()
    assert [row.get("loss") for row in metrics(place / "stopped")] == [row.get("loss") for row in metrics(trained)]


@pytest.mark.parametrize("launcher", ["--nproc", "torchrun"])
def test_two_ranks_of_one_command(place: Path, tiny_target: Path, trained: Path, launcher: str) -> None:
    words = (
        "train", "--config", "run.yaml", "--target", tiny_target, "--data", "train.jsonl", "--device", "cpu",
        "--output", launcher.strip("-"), *SMALL, "train.max_steps=2",
    )  # fmt: skip
    if launcher == "torchrun":
        process = start(place, *words, before=("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"))
    else:
        process = start(place, *words, "--nproc", "2")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    run = place / launcher.strip("-")
    for name in ("loss", "grad_norm"):
        expected = [row[name] for row in metrics(trained)[:2]]
        assert [row[name] for row in metrics(run)] == pytest.approx(expected, rel=1e-5), name
    environment = json.loads((run / "environment.json").read_text())
    assert environment["ranks"] == 2
    typed = [*map(str, words), *(() if launcher == "torchrun" else ("--nproc", "2"))]
    assert environment["sessions"][0]["command"][1:] == typed


def test_one_rank_of_many_prints_the_plan(call: Call, tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train", "--dry-run", "--target", tiny_target, "--data", "train.jsonl", "--output", "planned", *SMALL)
    monkeypatch.setenv("WORLD_SIZE", "8")
    for rank in ("0", "5"):
        monkeypatch.setenv("RANK", rank)
        assert ("ranks" in call(*words, "--device", "cpu")[0]) == (rank == "0")
