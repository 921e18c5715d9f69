"""Options that several modules read. Light to import: `--help` and the first line of output come before torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from torchspec.core.config.schema import DecodingConfig, EngineConfig, Fraction, Positive, Section, Seed, TargetReading


class TargetOptions(TargetReading):
    target: Path = Field(description="directory of the target, or `embedded` for the one that ships")
    device: str | None = Field(None, description="cpu, cuda, npu or a plug-in's name; default: what is here")
    backend: str = Field("hf", description="target engine: hf, sglang, vllm or a plug-in's name")

    def engine_config(self) -> EngineConfig:
        """What was said of the engine's process; nothing where a command has no flags for it."""
        return EngineConfig()


def _json_object(value: object) -> object:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object: {error.msg} at character {error.pos + 1}") from error


class EngineFlags(TargetOptions):
    """The `engine` section of a training, for commands that have flags alone."""

    engine_python: Path | None = Field(
        None, description="interpreter of an environment with the engine; default: what `torchspec engine install` made"
    )
    engine_url: str | None = Field(
        None, description="address of an engine's worker that is running already (docs/engines.md)"
    )
    engine_tensor_parallel: Positive = Field(1, description="devices over which the engine splits the target")
    engine_memory_fraction: float | None = Field(
        None, gt=0, le=1, description="share of each device's memory for the engine; default: the engine's own"
    )
    engine_start_timeout: float = Field(600, gt=0, description="seconds the engine may take to start")
    engine_call_timeout: float = Field(600, gt=0, description="seconds one call to the engine may take")
    engine_options: Annotated[dict[str, Any], BeforeValidator(_json_object)] = Field(
        {}, description="arguments of the engine's own constructor, as a JSON object"
    )

    def engine_config(self) -> EngineConfig:
        """Only with what was given, so that an engine without a process of its own can refuse it by name."""
        given = {
            f"engine_{name}": name for name in EngineConfig.model_fields if f"engine_{name}" in self.model_fields_set
        }
        return EngineConfig(**{name: getattr(self, flag) for flag, name in given.items()})


class PromptOptions(TargetOptions):
    data: list[Path] = Field(description="JSON, JSONL or Parquet files of conversations", min_length=1)
    max_length: int = Field(2048, ge=1, description="conversations whose prompt is longer are left out")


class JsonOption(Section):
    json_output: bool = Field(False, description="print one JSON object on stdout instead of tables")


class EvalOptions(DecodingConfig, JsonOption, PromptOptions, EngineFlags):
    draft: Path = Field(
        description="an exported draft (`draft/` of a run, or written by `torchspec export`), or a run or checkpoint"
    )
    engine: str | None = Field(
        None, description="measure the draft in this serving engine, vllm or sglang, and compare it with our decoder"
    )
    engine_only: bool = Field(
        False, description="with --engine: leave out the engine's run without the draft, and our decoder"
    )
    tolerance: Fraction = Field(
        0.05, description="with --engine: how far its acceptance length may be from our decoder's, relative"
    )
    sweep: list[Positive] = Field([], description="also measure these draft lengths, side by side")
    prompt_lookup: bool = Field(False, description="also measure n-gram drafting, for comparison")
    seed: Seed = Field(0, description="seed of sampling, at temperature > 0")
    output: Path | None = Field(None, description="write the figures here as JSON (eval.json)")
    track: bool = Field(False, description="give the figures to the trackers of the run that the draft is in, too")
