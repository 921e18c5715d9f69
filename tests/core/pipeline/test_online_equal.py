"""The same samples in the same order: the numbers of `torchspec train` to the last bit, and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.config.schema import RunConfig
from torchspec.core.data.batches import global_batches
from torchspec.core.data.dataset import DatasetSettings, TokenDataset, load_dataset
from torchspec.core.data.tokenizer import load_tokenizer
from torchspec.core.features.manifest import Manifest
from torchspec.core.interfaces.features import Features
from torchspec.core.pipeline.capture import capture
from torchspec.core.pipeline.inprocess import train
from torchspec.core.pipeline.online import OnlineDraftTrainer
from torchspec.core.training.stored import StoredFeatures

COMMON = {"batch_size": 4, "warmup_steps": 1, "epochs": 2, "lr": 0.01, "clip_norm": 0.5, "schedule": "cosine"}
CASES: dict[str, dict[str, Any]] = {
    "eagle3, packed, terms that change": {
        "algorithm": "eagle3",
        "draft": {"unroll": 3, "vocab_size": 100,
                  "objective": {"lk_lambda": 1.0, "tv": {"start": 0.2, "end": 0.0, "until": 0.5}}},
        "train": {**COMMON, "tokens_per_rank": 90, "weight_decay": 0.1},
    },
    "dflash in bfloat16, positions drawn at random": {
        "algorithm": "dflash",
        "draft": {"block_size": 4, "num_layers": 1, "num_anchors": 3},
        "train": {**COMMON, "micro_batch_size": 3, "recompute": True},
        "precision": {"compute": "bfloat16"},
    },
    "eagle3.1 in fp8, moments in 8 bits": {
        "algorithm": "eagle3.1",
        "draft": {"unroll": 2, "vocab_size": 100},
        "train": {**COMMON, "micro_batch_size": 3, "optimizer": "adamw8bit"},
        "precision": {"compute": "fp8", "fp8_scaling": "tensor"},
    },
}  # fmt: skip
LOOP = {"epochs"}


def data_of(config: RunConfig) -> TokenDataset:
    settings = DatasetSettings.of_training(config)
    return load_dataset(config.data.train, load_tokenizer(config.target.path), settings)


def metrics(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the numbers decide."""
    apart = {"kind", "epoch", "memory", "pipeline", "tokens_per_second", "step_seconds", "time", "stale_samples"}
    return [{name: _plain(value) for name, value in row.items() if name not in apart} for row in rows]


def _plain(value: Any) -> Any:
    """As JSON has it: a figure of nothing is null."""
    return None if isinstance(value, float) and math.isnan(value) else value


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_torchspec_train(
    case: dict[str, Any], make_config: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if case["train"].get("optimizer") == "adamw8bit":
        request.getfixturevalue("torchao")
    words = ["data.validation=[]", "data.max_length=64", "seed=7"]
    directory = capture(make_config(tmp_path / "features", *words, **case)[0]).directory
    offline = [f"pipeline.features={directory}", "pipeline.topology=offline"]
    config, _ = make_config(tmp_path / "run", *words, *offline, **case)
    train(config, provenance={})
    expected = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    data = data_of(config)
    stored = StoredFeatures(directory=directory, manifest=Manifest.load(directory), budget=0)
    mine = {**case["train"], "max_steps": len(expected)}
    online = OnlineDraftTrainer(
        config.target.path,
        algorithm=case["algorithm"],
        draft=case["draft"],
        train={name: value for name, value in mine.items() if name not in LOOP},
        precision=case.get("precision"),
        device="cpu",
        seed=7,
        token_counts=data.token_counts_V,
    )
    found = []
    for epoch in range(config.train.epochs):
        order = {"batch_size": config.train.batch_size, "bucket_size": config.data.bucket_size, "seed": 7}
        for index in [i for batch in global_batches(data.lengths, **order, epoch=epoch) for i in batch]:
            sample = data[index]
            features = stored.read(index, sample)
            assert isinstance(features, Features)
            online.add(
                sample.input_ids_T, sample.loss_mask_T, features.taps_TNH, features.last_TH,
                norm_state=features.norm_state, name=sample.sample_id, epoch=epoch,
            )  # fmt: skip
            row = online.step()
            found += [] if row is None else [row]
        assert (online.pending.samples, online.step()) == (1, None)
        row = online.step(partial=True)
        assert row is not None
        found.append(row)
    assert len(expected) == 8
    assert metrics(found) == metrics(expected)
    assert len({row["loss"] for row in found}) == 8
    online.export(tmp_path / "draft")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "draft" / name).read_bytes() == (tmp_path / "run" / "draft" / name).read_bytes()
