"""A draft of blocks on the command line: plan, train on one rank and on two, evaluate, export, start from an export."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from torchspec.cli import main

SIZES = ("draft.block_size=4", "draft.num_layers=2", "draft.num_anchors=6", "draft.sliding_window=9")
DECODING = ("eval.samples=2", "eval.max_new_tokens=6", "eval.draft_length=3")
Call = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("blocks")
    for name, count in (("train", 12), ("held_out", 4)):
        rows = []
        for n in range(count):
            said = " ".join(["the", "quick", "brown", "fox", "returns", "a", "value"][n % 4 :] * 2)
            turns = [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": said}]
            rows.append(json.dumps({"id": f"{name}{n}", "messages": turns}) + "\n")
        (directory / f"{name}.jsonl").write_text("".join(rows))
    return directory


@pytest.fixture(scope="module")
def words(tiny_target: Path) -> tuple[str, ...]:
    return (
        "train", "--algorithm", "dflash", "--target", str(tiny_target), "--data", "train.jsonl", "--device", "cpu",
        "data.max_length=96", "train.batch_size=4", "train.micro_batch_size=2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def call(place: Path) -> Iterator[Call]:
    """Run the command line in this process and that directory, expecting an exit code: what it says."""

    def run(*given: str, code: int = 0) -> str:
        out, err = io.StringIO(), io.StringIO()
        with chdir(place), redirect_stdout(out), redirect_stderr(err):
            got = main(list(given))
        assert got == code, err.getvalue()
        assert "Traceback" not in err.getvalue()
        return out.getvalue() + err.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHSPEC_CACHE", str(place / "cache"))
        yield run


@pytest.fixture(scope="module")
def trained(place: Path, call: Call, words: tuple[str, ...]) -> Path:
    """A finished run of 6 steps, of which both layouts are exported."""
    call(*words, *SIZES, "--validation", "held_out.jsonl", *DECODING, "train.epochs=2", "--output", "run")
    for name in ("hf", "vllm"):
        call("export", "--checkpoint", "run", "--format", name, "--output", f"served_{name}")
    return place / "run"


def figures(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_plan_is_printed_and_nothing_is_written(place: Path, call: Call, words: tuple[str, ...]) -> None:
    text = call(*words, *SIZES, "--dry-run", "--output", "planned")
    assert "memory per rank" in text
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["draft.block_size"]]
    assert line.split()[1:] == ["4", "from", "command", "line"]
    assert not (place / "planned").exists()


def test_a_draft_that_no_engine_serves_is_told_before_it_is_trained(
    place: Path, call: Call, words: tuple[str, ...]
) -> None:
    options = (*words, *SIZES, "draft.sample_from_anchor=true", "--output", "unserved")
    warning = "no engine is known to serve a DFlash draft whose anchor's slot predicts"
    assert warning in call(*options, "--dry-run")
    text = call(*options, "train.max_steps=1")
    assert text.index(warning) < text.index("train 1/1")
    assert warning not in call(*words, *SIZES, "--dry-run", "--output", "planned")


def test_a_run_is_evaluated(call: Call, trained: Path, tiny_target: Path) -> None:
    rows = figures(trained)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] > rows[5]["loss"]
    assert any(row["kind"] == "validation" and row["acceptance_length"] >= 1 for row in rows)
    text = call(
        "eval", "--target", str(tiny_target), "--draft", "run/draft", "--data", "held_out.jsonl", "--samples", "2",
        "--max-new-tokens", "6", "--device", "cpu", "--draft-length", "3", "--sweep", "1", "9", "--json",
    )  # fmt: skip
    result = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert result["lossless"] is True
    assert {row["draft_length"]: row["longest_draft"] for row in result["sweep"]} == {1: 1, 3: 3, 9: 3}
    text = call(
        "eval", "--target", str(tiny_target), "--draft", "run/draft", "--data", "held_out.jsonl", "--samples", "2",
        "--max-new-tokens", "6", "--device", "cpu", "--draft-length", "2", "--sweep", "9",
    )  # fmt: skip
    assert "draft length 9: no round drafted more than 3, all that the draft has" in text
    assert "draft length 2: no round" not in text


def test_two_ranks_that_share_sequences_train_the_same(place: Path, trained: Path, words: tuple[str, ...]) -> None:
    command = [
        sys.executable, "-m", "torchspec", *words, *SIZES, "--validation", "held_out.jsonl", *DECODING,
        "train.epochs=2", "--nproc", "2", "parallel.ulysses=2", "--output", "shared",
    ]  # fmt: skip
    environment = {**os.environ, "TORCHSPEC_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    for alone, shared in zip(figures(trained), figures(place / "shared"), strict=True):
        assert shared["kind"] == alone["kind"]
        if alone["kind"] == "train":
            assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("layout", ["hf", "vllm"])
def test_a_run_starts_from_an_exported_draft(
    place: Path, call: Call, trained: Path, words: tuple[str, ...], layout: str
) -> None:
    output = f"warm_{layout}"
    call(*words, *SIZES, f"draft.init_from=served_{layout}", "train.max_steps=1", "train.lr=1e-12", "--output", output)
    first, warm = (load_file(run / "draft/model.safetensors") for run in (trained, place / output))
    assert first.keys() == warm.keys()
    assert all(torch.allclose(warm[name], value, rtol=0, atol=1e-6) for name, value in first.items())


@pytest.mark.parametrize("layout", ["hf", "vllm"])
def test_a_draft_config_gives_the_sizes_and_the_checkpoint_stands_alone(
    place: Path, call: Call, trained: Path, words: tuple[str, ...], layout: str
) -> None:
    """What the options have by default is not what somebody asked for against the file, when a run is rebuilt, too."""
    output = f"sized_{layout}"
    call(*words, f"draft.config=served_{layout}", "draft.num_anchors=6", "train.max_steps=1", "--output", output)
    assert figures(place / output)[0]["loss"] == figures(trained)[0]["loss"]
    call("export", "--checkpoint", output, "--format", "hf", "--output", f"{output}_served")
    told = [json.loads((place / name / "config.json").read_text()) for name in (f"{output}_served", "served_hf")]
    assert told[0] == told[1]


def test_a_layout_that_cannot_hold_the_draft_is_refused(place: Path, call: Call, words: tuple[str, ...]) -> None:
    options = ("draft.vocab_size=64", "draft.sample_from_anchor=true", "draft.weighting=dpace")
    call(*words, *SIZES, *options, "train.max_steps=1", "--output", "pruned")
    assert json.loads((place / "pruned/draft/config.json").read_text())["speculators_model_type"] == "dflash"
    text = call("export", "--checkpoint", "pruned", "--format", "hf", "--output", "no", code=2)
    assert "draft.sample_from_anchor" in text
    assert "draft.vocab_size" in text
    call("export", "--checkpoint", "pruned", "--format", "vllm", "--output", "yes")


def test_misfits_are_told_together(call: Call, words: tuple[str, ...]) -> None:
    text = call(*words, "draft.mask_token=999999", "draft.layer_types=[full]", "--output", "wrong", code=2)
    assert "draft.mask_token" in text
    assert "draft.layer_types" in text
