"""Options that several commands share. Light to import: `--help` and the first line of output come before torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from torchspec.core.config.schema import Section, TargetReading


class TargetOptions(TargetReading):
    target: Path = Field(description="directory of the target model, or `embedded` for the one that ships")
    device: str | None = Field(None, description="cpu, cuda, npu or a plug-in's name; default: what is here")
    backend: str = Field("hf", description="target engine: hf, sglang, vllm or a plug-in's name")


class PromptOptions(TargetOptions):
    data: list[Path] = Field(description="JSON, JSONL or Parquet files of conversations", min_length=1)
    max_length: int = Field(2048, ge=1, description="conversations whose prompt is longer are left out")


class JsonOption(Section):
    json_output: bool = Field(False, description="print one JSON object on stdout instead of tables")
