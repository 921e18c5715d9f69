"""`torchspec capture` on the command line: one shared file, what is refused and told, stopped and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torchspec.cli import main

Call = Callable[..., tuple[int, str, str]]

SHARED = """\
target: {{path: {target}}}
device: cpu
output: {output}
data: {{train: [{data}], validation: [nowhere.jsonl], cache_dir: {cache}, max_length: 64}}
train: {{epochs: 9, batch_size: 4, micro_batch_size: 2, lr: 0.1, warmup_steps: 1, max_steps: 2}}
parallel: {{exchange: auto}}
eval: {{every: 5}}
pipeline: {{topology: offline, features: {features}}}
draft: {{unroll: 2, vocab_size: 64}}
"""


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def shared(tiny_target: Path, tmp_path: Path) -> Path:
    """A training's file, whose validation data are elsewhere."""
    lines = []
    for number in range(9):
        said = ["the quick brown fox"[number:], "the value of the function returns the value"[: 9 + number]]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
        lines.append(json.dumps({"id": f"row{number}", "messages": turns}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    text = SHARED.format(
        target=tiny_target, output=tmp_path / "run", data=tmp_path / "data.jsonl", cache=tmp_path / "cache",
        features=tmp_path / "features",
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path / "run.yaml"


def test_one_file_for_the_capture_and_the_training(call: Call, shared: Path, tmp_path: Path) -> None:
    words = ("capture", "--config", str(shared), "--output", str(tmp_path / "features"))
    code, out, err = call(*words)
    assert (code, out) == (0, "")
    assert "9 of 9 samples to capture" in err
    assert "GB of features expected" in err
    assert "9 of 9 samples captured (0 were there)" in err
    assert "tokens/s" in err
    assert "(9 were there)" in call(*words)[2]

    code, _, err = call("train", "--config", str(shared), "data.validation=[]", "train.warmup_steps=9")
    assert code == 0, err
    assert "train.warmup_steps=9 is as long as the whole run of 2 steps" in err
    assert re.search(
        r"as planned \(--dry-run says more\): (about [\d.]+ to [\d.]+ min|less than a minute): 2 steps, ", err
    )
    assert "by the plan" in err
    assert "trained 2 steps" in err


def test_settings_without_a_use_are_refused_by_name_on_the_command_line(
    call: Call, shared: Path, tmp_path: Path
) -> None:
    code, _, err = call(
        "capture", "--config", str(shared), "--output", str(tmp_path / "features"), "train.lr=1e-3", "eval.samples=3",
        "parallel.exchange=auto", "target.tensor_parallel=2", "seed=3", "draft.unroll=3", "train.batch_size=2",
    )  # fmt: skip
    assert code == 2
    refused = [line.split(":")[0].removeprefix("  - ") for line in err.splitlines() if line.startswith("  - ")]
    assert sorted(refused) == ["eval.samples", "parallel.exchange", "target.tensor_parallel", "train.lr"]
    assert not (tmp_path / "features").exists()


def test_everything_wrong_is_reported_at_once(call: Call, tmp_path: Path) -> None:
    code, _, err = call(
        "capture", "--devise", "cpu", "--target", str(tmp_path), "train.batch_size=none", "--nproc", "2"
    )
    assert code == 2
    for word in ("--devise", "--nproc", "data.train", "output", "train.batch_size"):
        assert f"- {word}: " in err, err
    code, _, err = call("capture", "--target", str(tmp_path), "--data", "nowhere.jsonl", "--output", f"{__file__}/x")
    assert code == 2
    for word in ("target.path: no config.json", "data.train: no such file", "output: "):
        assert f"- {word}" in err, err


def test_help_says_what_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["capture", "--help"])
    said = capsys.readouterr().out
    for word in (
        "--config FILE",
        "pipeline.topology=offline",
        "refused on the command line",
        "One process and one engine",
    ):
        assert word in said


def test_a_run_is_no_place_for_features(call: Call, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "environment.json"):  # with which a training would look for checkpoints
        (tmp_path / "run" / name).write_text("")
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    code, _, err = call("capture", "--config", str(shared))
    assert code == 1
    assert "checkpoints, environment.json, metrics.jsonl, and no capture to go on with: name an empty directory" in err


def test_terminated_and_given_again(call: Call, shared: Path, tmp_path: Path) -> None:
    """SIGTERM finishes the group, ends with 143 and says how to go on."""
    features = tmp_path / "features"
    words = ["capture", "--config", str(shared), "--output", str(features), "train.micro_batch_size=1"]
    command = [sys.executable, "-m", "torchspec", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not list(features.glob("*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    there = len(list(features.glob("*.safetensors")))
    if there < 9:
        assert process.returncode == 143, err
        assert f"stopped: {there} of 9 samples captured; the same command goes on" in err
    code, _, err = call(*words)
    assert code == 0, err
    assert f"9 of 9 samples captured ({there} were there)" in err
