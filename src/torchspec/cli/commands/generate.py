"""`torchspec generate`: conversations in the target's own words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from torchspec.cli.console import ProgressDisplay, announce
from torchspec.cli.options import Parser, add_options, all_flags, read_options
from torchspec.cli.schemas import EngineFlags, JsonOption
from torchspec.core.config.schema import Positive, Seed, Temperature


class GenerateOptions(JsonOption, EngineFlags):
    data: list[Path] = Field(description="JSON, JSONL or Parquet files of conversations", min_length=1)
    output: Path = Field(description="the JSONL file to write; a run that was stopped continues it")
    max_new_tokens: Positive = Field(512, description="tokens of one assistant turn at most")
    temperature: Temperature = Field(0.0, description="sampling temperature; 0: greedy")
    batch_size: Positive = Field(8, description="conversations written together")
    seed: Seed = Field(0, description="seed of sampling, at temperature > 0")


def parser() -> Parser:
    made = Parser(
        "generate",
        "Have the target write every assistant turn of the conversations itself. A draft trained on the target's own\n"
        "text meets in training what it will meet when served. Give the same command again to continue a stopped run.",
    )
    flags = all_flags(GenerateOptions)
    first = ("target", "data", "output", "device", "backend")
    add_options(made, GenerateOptions, {path: flags[path] for path in dict.fromkeys((*first, *flags))})
    return made


def run(words: Sequence[str]) -> int:
    options = read_options(parser(), GenerateOptions, words)
    announce("torchspec generate: loading")

    from torchspec.cli.target import check, load_target
    from torchspec.core.decoding.regenerate import RegenerateSettings, regenerate

    check(options, "generate", options.data, output=options.output)
    settings = RegenerateSettings(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    with ProgressDisplay() as progress:
        with progress.phase("load target"):
            target = load_target(options)
        try:
            report = regenerate(
                target.engine,
                target.tokenizer,
                options.data,
                options.output,
                settings,
                dtype=target.dtype,
                images=target.images,
                progress=progress,
            )
        finally:
            target.engine.close()
    if options.json_output:
        print(json.dumps({**dataclasses.asdict(report), "failures": report.failures and str(report.failures)}))
        return 0
    print(
        f"{report.read} conversations read: {report.ok} written ({report.cut} cut short), {report.skipped} were there "
        f"already, {report.failed} failed; {report.turns} turns, {report.tokens} tokens in {options.output}"
    )
    if report.failures is not None:
        print(f"what failed, and why: {report.failures}")
    return 0
