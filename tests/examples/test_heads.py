"""The algorithm of examples/torchspec-heads: small, found by its entry point, trained, exported and decoded with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchspec-heads"
SETTINGS = ["--device", "cpu", "--algorithm", "heads", "--target", "embedded", "draft.steps=3", "train.epochs=2",
            "train.batch_size=4", "train.lr=1e-3", "data.max_length=96"]  # fmt: skip


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of processes that have the distribution."""
    source, place = tmp_path_factory.mktemp("heads") / "source", tmp_path_factory.mktemp("with_heads")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    ran = subprocess.run([*command, "--target", str(place), str(source)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place)}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n} and {n}?"},
                      {"role": "assistant", "content": f"It is {2 * n}, since {n} and {n} make {2 * n}."}]}
        for n in range(8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def torchspec(words: list[object], variables: dict[str, str]) -> str:
    command = [sys.executable, "-P", "-m", "torchspec", *map(str, words)]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_it_is_small() -> None:
    assert len((EXAMPLE / "torchspec_heads.py").read_text().splitlines()) < 150


def test_it_trains_exports_and_decodes_without_loss(heads: dict[str, str], conversations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchspec(["train", *SETTINGS, "--data", conversations, "--output", run, "train.log_every=1"], heads)
    assert len(losses(run)) == 4
    words = ["eval", "--target", "embedded", "--device", "cpu", "--draft", run / "draft", "--data", conversations]
    found = json.loads(torchspec([*words, "--samples", "2", "--max-new-tokens", "16", "--json"], heads))
    assert found["lossless"]
    assert found["acceptance_length"] >= 1


def test_ranks_share_its_sequences_and_rows_are_packed(
    heads: dict[str, str], conversations: Path, tmp_path: Path
) -> None:
    """Which it has from torchspec's batches: nothing of it is in the example."""
    common = ["train", *SETTINGS, "--data", conversations, "train.log_every=1"]
    shared = ["--nproc", "2", "parallel.ulysses=2", "target.shard_logits=vocabulary", "train.tokens_per_rank=64"]
    torchspec([*common, "--output", tmp_path / "alone"], heads)
    torchspec([*common, *shared, "--output", tmp_path / "shared"], heads)
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
