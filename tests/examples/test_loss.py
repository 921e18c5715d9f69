"""The loss of examples/torchspec-loss: what it says it is, found by its entry point, trained with and decoded with."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "examples" / "torchspec-loss" / "torchspec_loss.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torchspec_loss", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("order", [1.5, 2.0, 4.0])
def test_its_term_is_the_divergence(example: ModuleType, order: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, p = torch.randn(5, 12, generator=generator).double(), torch.rand(5, 12, generator=generator).double()
    p[:, 3] = 0
    p /= p.sum(-1, keepdim=True)
    q = logits.exp() / logits.exp().sum(-1, keepdim=True)
    want = ((p**order / q ** (order - 1)).sum(-1)).log() / (order - 1)
    torch.testing.assert_close(example.renyi(logits, p, order), want, rtol=1e-12, atol=1e-12)
    kl = torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)
    torch.testing.assert_close(example.renyi(logits, p, 1 + 1e-6), kl, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_it_trains_and_its_draft_is_eagle3s(
    with_example: Callable[[str], dict[str, str]],
    conversations: Path,
    torchspec: Callable[[list[object], dict[str, str]], str],
    tmp_path: Path,
) -> None:
    variables, common = with_example("torchspec-loss"), ["--device", "cpu", "--target", "embedded"]
    settings = ["draft.order=3", "draft.unroll=2", "train.epochs=2", "train.batch_size=4", "train.lr=1e-3"]
    words = ["train", *common, "--algorithm", "eagle3-renyi", "--data", conversations, "--output", tmp_path / "run"]
    torchspec([*words, *settings, "train.log_every=1"], variables)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    words = ["eval", *common, "--draft", tmp_path / "run" / "draft", "--data", conversations, "--samples", "2"]
    without = {name: value for name, value in variables.items() if name != "PYTHONPATH"}
    assert json.loads(torchspec([*words, "--max-new-tokens", "8", "--json"], without))["lossless"]
