"""Runs of the command line whose two ranks share sequences, the target or its head, against one rank's run.

The same curve, the same tokens, the same figures of acceptance, and a draft; a checkpoint goes on with other ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchspec.core.config.load import load_config
from torchspec.core.pipeline.inprocess import train

pytestmark = pytest.mark.slow

STEPS, STOP = 8, 3
CIRCUMSTANCES = {"padding_fraction", "tokens_per_second", "step_seconds", "time", "memory", "seconds"}
"""What a row of metrics.jsonl says of how it came about, and not of the model."""

CLOSE, CANCELLED = 1e-5, 5e-5
"""Relative, in float32; the KL divergence is a small difference of large sums."""

SHAPES = {
    "ulysses": ("train.micro_batch_size=2", "parallel.ulysses=2", "parallel.exchange=ulysses"),
    "target held together": (
        "train.micro_batch_size=4", "parallel.ulysses=2", "target.tensor_parallel=2", "train.recompute=true",
    ),
}  # fmt: skip
PACKED = ("parallel.ring=2", "parallel.exchange=ring", "train.tokens_per_rank=64", "target.shard_logits=vocabulary")

Row = dict[str, Any]
Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def values(tiny_target: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "device": "cpu",
        "target": {"path": str(tiny_target)},
        "data": {
            "train": [str(conversations / "train.jsonl")],
            "validation": [str(conversations / "validation.jsonl")],
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "max_length": 128,
        },
        "train": {"batch_size": 4, "epochs": 2, "schedule": "constant", "warmup_steps": 1, "checkpoint_every": STOP},
        "eval": {"samples": 3, "max_new_tokens": 6, "draft_length": 2, "every": 4},
        "draft": {"unroll": 3, "vocab_size": 100},
    }


@pytest.fixture(scope="module")
def one_rank(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone(values, tmp_path_factory.mktemp("one") / "run")


def alone(values: dict[str, Any], run: Path, *words: str) -> Path:
    config, provenance = load_config(values={**values, "output": str(run)}, overrides=words)
    train(config, provenance=provenance)
    return run


def two_ranks(values: dict[str, Any], run: Path, *words: str) -> Path:
    file = run.parent / "run.yaml"
    file.write_text(yaml.safe_dump({**values, "output": str(run)}))
    command = [sys.executable, "-m", "torchspec", "train", "--config", str(file), "--nproc", "2", *words]
    ran = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return run


def rows(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def of_the_model(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in CIRCUMSTANCES}


def compare(run: Path, expected: Path) -> None:
    """Every figure of every row; counts are exact."""
    mine, others = rows(run), rows(expected)
    assert [(row["kind"], row["step"]) for row in mine] == [(row["kind"], row["step"]) for row in others]
    for row, other in zip(map(of_the_model, mine), map(of_the_model, others), strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            where = f"{name} of the {other['kind']} at step {other['step']}"
            if isinstance(value, float | list):
                value = pytest.approx(value, rel=CANCELLED if name.startswith("kl") else CLOSE, abs=1e-9)
            assert row[name] == value, where
    assert (run / "draft" / "model.safetensors").stat().st_size > 0
    assert (run / "draft" / "config.json").is_file()


def test_the_one_rank_that_they_are_held_against_learns(one_rank: Path) -> None:
    """And its figures are not all the same, so that comparing them says something."""
    trained = [row for row in rows(one_rank) if row["kind"] == "train"]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.1
    assert len({row["loss"] for row in trained}) == STEPS
    validated = [row for row in rows(one_rank) if row["kind"] == "validation"]
    assert [row["step"] for row in validated] == [4, 8]
    assert all(row["rounds"] > 0 for row in validated)


@pytest.mark.parametrize("name", SHAPES)
def test_two_ranks_that_share_give_one_ranks_run(
    values: dict[str, Any], one_rank: Path, tmp_path: Path, name: str
) -> None:
    compare(two_ranks(values, tmp_path / "run", *SHAPES[name]), one_rank)


def test_a_run_goes_on_with_other_ranks(values: dict[str, Any], one_rank: Path, tmp_path: Path) -> None:
    """One rank until it is stopped, then two that share packed sequences and the target's head."""
    run = alone(values, tmp_path / "run", f"train.max_steps={STOP}", "eval.every=0", "data.validation=[]")
    assert [row["step"] for row in rows(run)] == list(range(1, STOP + 1))
    compare(two_ranks(values, run, *PACKED), one_rank)
    sessions = json.loads((run / "environment.json").read_text())["sessions"]
    assert [(session["from_step"], session["ranks"]) for session in sessions] == [(0, 1), (STOP, 2)]
