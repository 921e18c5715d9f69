"""The algorithm of examples/torchspec-heads: small, found by its entry point, trained, exported and decoded with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Torchspec = Callable[[list[object], dict[str, str]], str]

SOURCE = Path(__file__).parents[2] / "examples" / "torchspec-heads" / "torchspec_heads.py"
SETTINGS = ["--device", "cpu", "--algorithm", "heads", "--target", "embedded", "draft.steps=3", "train.epochs=2",
            "train.batch_size=4", "train.lr=1e-3", "data.max_length=96"]  # fmt: skip


@pytest.fixture(scope="module")
def heads(with_example: Callable[[str], dict[str, str]]) -> dict[str, str]:
    return with_example("torchspec-heads")


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_it_is_small() -> None:
    assert len(SOURCE.read_text().splitlines()) < 150


def test_it_trains_exports_and_decodes_without_loss(
    heads: dict[str, str], conversations: Path, torchspec: Torchspec, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command: list[object] = ["train", *SETTINGS, "--data", conversations, "--output", run, "train.log_every=1"]
    assert json.loads(torchspec([*command, "--dry-run", "--json"], heads))["memory"]["fits"]
    torchspec(command, heads)
    assert len(losses(run)) == 4
    words = ["eval", "--target", "embedded", "--device", "cpu", "--draft", run / "draft", "--data", conversations]
    found = json.loads(torchspec([*words, "--samples", "2", "--max-new-tokens", "16", "--json"], heads))
    assert found["lossless"]
    assert found["acceptance_length"] >= 1


def test_ranks_share_its_sequences_and_rows_are_packed(
    heads: dict[str, str], conversations: Path, torchspec: Torchspec, tmp_path: Path
) -> None:
    """Which it has from torchspec's batches: nothing of it is in the example."""
    common = ["train", *SETTINGS, "--data", conversations, "train.log_every=1"]
    shared = ["--nproc", "2", "parallel.ulysses=2", "target.shard_logits=vocabulary", "train.tokens_per_rank=64"]
    torchspec([*common, "--output", tmp_path / "alone"], heads)
    torchspec([*common, *shared, "--output", tmp_path / "shared"], heads)
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
