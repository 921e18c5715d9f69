"""What Python programs call: the same schema, checks and pipeline as the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchspec.core.config.load import load_config
from torchspec.core.config.schema import RunConfig

if TYPE_CHECKING:
    from torchspec.core.models.target_tensors import TargetTensors
    from torchspec.core.pipeline.inprocess import RunOutcome
    from torchspec.core.pipeline.online import OnlineDraftTrainer

__all__ = ["OnlineDraftTrainer", "TargetTensors", "load_config", "train"]


def __getattr__(name: str) -> object:
    """Classes, which are imported when first used: they bring torch with them."""
    if name == "OnlineDraftTrainer":
        from torchspec.core.pipeline.online import OnlineDraftTrainer

        return OnlineDraftTrainer
    if name == "TargetTensors":
        from torchspec.core.models.target_tensors import TargetTensors

        return TargetTensors
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def train(config: RunConfig | Mapping[str, Any]) -> RunOutcome:
    """Train a draft as `torchspec train` does and return what came of it.

    `config` is a `RunConfig`, or nested mappings of settings: `{"target": {"path": "embedded"}, "data": {"train":
    ["a.jsonl"]}, "output": "runs/a"}`. Under torchrun every rank calls this.

    Raises ConfigError with every problem of the configuration; TorchspecError for what goes wrong later.
    """
    from torchspec.core.pipeline.inprocess import train as run

    if isinstance(config, RunConfig):
        provenance = dict.fromkeys(_paths(config), "python")
    else:
        config, provenance = load_config(values=config)
    return run(config, provenance=provenance)


def _paths(config: RunConfig) -> list[str]:
    from torchspec.core.config.fields import settings

    return list(settings(type(config)))
