"""The `offline` topology: features that `torchspec capture` left in a directory, and whether they are this run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from torchspec.core.config.schema import RunConfig
from torchspec.core.data import cache
from torchspec.core.data.dataset import DatasetSettings
from torchspec.core.errors import FeatureStoreError
from torchspec.core.features.manifest import Manifest, differences
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_spec import running_dtype
from torchspec.core.pipeline.identity import known_facts
from torchspec.core.pipeline.topology import PREFETCH_MB
from torchspec.core.training.stored import StoredFeatures


def stored(config: RunConfig) -> StoredFeatures:
    """Those that the configuration names; FeatureStoreError where no capture was finished."""
    directory = config.pipeline.features
    assert directory is not None
    megabytes = config.pipeline.prefetch_mb or PREFETCH_MB
    return StoredFeatures(directory=directory, manifest=Manifest.load(directory), budget=megabytes * 1_000_000)


def check_stored(
    config: RunConfig,
    algorithm: Algorithm,
    target: TargetSpec,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> None:
    """FeatureStoreError with everything in which the features are not those that this run would capture."""
    directory = config.pipeline.features
    assert directory is not None
    manifest = Manifest.load(directory)
    ingredients = cache.ingredients(config.data.train, tokenizer, DatasetSettings.from_config(config.data), None)
    ours = features_identity(config, algorithm, target, tokenizer, device, ingredients)
    refuse_other_features(directory, manifest.identity, ours)


def features_identity(
    config: RunConfig,
    algorithm: Algorithm,
    target: TargetSpec,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    ingredients: dict[str, Any],
) -> dict[str, Any]:
    """JSON: the target, what is taken from it in which precision, and the data (`ingredients`, as the dataset's)."""
    known = known_facts(config, algorithm, target, tokenizer, {})["identity"]
    contents = {f"{number} ({name})": digest for number, (name, digest) in enumerate(ingredients["files"], start=1)}
    facts = {
        "target": known["target"],
        "taps": known["taps"],
        "dtype": str(running_dtype(config.target.dtype, target.dtype, device)).removeprefix("torch."),
        "data": {**ingredients, "files": contents},
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))  # so that it equals one that was stored
    return plain


def refuse_other_features(directory: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """FeatureStoreError with every difference."""
    found = list(differences(theirs, ours))
    if found:
        listed = "\n".join(f"  - {line}" for line in found)
        raise FeatureStoreError(
            f"{directory} holds other features than this configuration asks for:\n{listed}\n"
            "Undo the change, or have these captured into another directory"
        )
