"""The part of a training's configuration that a capture for it uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchspec.core import registry
from torchspec.core.config.schema import EngineConfig, RunConfig, Section, TrainConfig
from torchspec.core.errors import Problem

COMMAND_LINE = "command line"
GROUPS = ("batch_size", "micro_batch_size", "tokens_per_rank")
USED = (
    "output", "device", "backend", "algorithm", "seed",
    *(f"target.{name}" for name in ("path", "dtype", "chat_template", "thinking", "trust_remote_code")),
    *(f"data.{name}" for name in
      ("train", "max_length", "min_supervised_tokens", "last_turn_only", "cache_dir", "bucket_size")),
    *(f"train.{name}" for name in GROUPS),
    "parallel.ulysses", "parallel.ring",
)  # fmt: skip
"""Besides all of `engine` and `draft`."""
SECTIONS = ("target", "data", "train", "engine", "draft")
"""Of which something is used."""


def idle_problems(provenance: Mapping[str, str]) -> list[Problem]:
    """What the command line itself gives and a capture would pass over; in a shared file it may stand."""
    given = [path for path, source in provenance.items() if source == COMMAND_LINE]
    return [
        Problem(
            field=path, message="means nothing to a capture", remedy="leave it out; in a --config file it may stand"
        )
        for path in given
        if path not in USED and path.partition(".")[0] not in ("engine", "draft")
    ]


def sequence_ranks(config: RunConfig) -> int:
    """Of the training that the capture is for."""
    return config.parallel.ulysses * config.parallel.ring


def captured_config(config: RunConfig) -> RunConfig:
    """The same for one process that holds the target and trains nothing: every setting that is not used, as it is
    where nothing was said. Rows are as long as those of the ranks that will share them."""
    train = {name: getattr(config.train, name) for name in GROUPS if name in config.train.model_fields_set}
    if config.train.tokens_per_rank is not None:
        train["tokens_per_rank"] = config.train.tokens_per_rank * sequence_ranks(config)
    other: dict[str, Any] = {
        name: type(value)() for name, value in config if isinstance(value, Section) and name not in SECTIONS
    }
    other["train"] = TrainConfig(**train)
    other["target"] = config.target.model_copy(update={"tensor_parallel": 1, "shard_logits": "auto"})
    other["data"] = config.data.model_copy(update={"validation": []})
    if getattr(config.draft, "init_from", None) is not None:
        other["draft"] = config.draft.model_copy(update={"init_from": None})
    if _inside(config.backend):
        other["engine"] = EngineConfig()
    return config.model_copy(update=other)


def _inside(backend: str) -> bool:
    """Whether the engine runs in this process, where an `engine` section is for another topology of the training."""
    names: Sequence[str] = registry.backends().names()
    return backend in names and registry.backends().spec(backend).available is None
