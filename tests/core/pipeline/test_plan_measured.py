"""A plan's memory against what a run measures: the resident peak of its steps, of the rank that used most."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOLERANCE = 0.15
EAGLE3 = ("draft.unroll=5",)
BLOCKS = ("--algorithm", "dflash", "draft.num_layers=2", "draft.block_size=12", "draft.num_anchors=256")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four texts, each longer than the 1,024 tokens that are used of it."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    chosen = random.Random(0)
    words = ["return", "value", "of", "the", "list", "def", "for", "in", "class", "import", "self", "none"]
    rows = [{"text": " ".join(chosen.choices(words, k=1500))} for _ in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def torchspec(*words: str) -> str:
    command = [sys.executable, "-P", "-m", "torchspec", *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    "words",
    [
        (*EAGLE3, "train.batch_size=4", "train.micro_batch_size=4"),
        (*EAGLE3, "--nproc", "2", "train.batch_size=4", "parallel.ulysses=2"),
        (*BLOCKS, "train.batch_size=4", "train.micro_batch_size=4"),
    ],
    ids=["one rank", "two ranks share sequences", "blocks at some positions"],
)
def test_the_peak_is_predicted(words: tuple[str, ...], texts: Path, tmp_path: Path) -> None:
    settings = (
        "train", "--target", "embedded", "--data", str(texts), "--output", str(tmp_path / "run"), "--device", "cpu",
        f"data.cache_dir={tmp_path / 'cache'}", "data.max_length=1024", "train.loss_memory_mb=150",
        "train.max_steps=2", *words,
    )  # fmt: skip
    plan = json.loads(torchspec(*settings, "--dry-run", "--json"))["memory"]
    process = next(part["bytes"] for part in plan["parts"] if part["name"] == "process")
    assert plan["peak"] - process > 200_000_000, "too little to tell a good estimate from the process alone"
    torchspec(*settings)
    rows: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    measured = max(row["memory"]["peak"] for row in rows if row["kind"] == "train")
    assert plan["peak"] == pytest.approx(measured, rel=TOLERANCE)
