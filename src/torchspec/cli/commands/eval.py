"""`torchspec eval`: what a draft is worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from torchspec.cli.console import ProgressDisplay, announce
from torchspec.cli.options import Parser, add_options, all_flags, read_options
from torchspec.cli.schemas import JsonOption, PromptOptions
from torchspec.core.config.schema import DecodingConfig, Positive, Seed


class EvalOptions(DecodingConfig, JsonOption, PromptOptions):
    draft: Path = Field(description="an exported draft: `draft/` of a run, or written by `torchspec export`")
    sweep: list[Positive] = Field([], description="also measure these draft lengths, side by side")
    prompt_lookup: bool = Field(False, description="also measure n-gram drafting, for comparison")
    seed: Seed = Field(0, description="of sampling, at temperature > 0")
    output: Path | None = Field(None, description="write the figures here as JSON (eval.json)")


def parser() -> Parser:
    made = Parser(
        "eval",
        "Measure a draft by lossless speculative decoding: every prompt is decoded with the draft and without it, and\n"
        "the texts are compared. The prompts are the conversations up to their last assistant turn.",
    )
    flags = all_flags(EvalOptions)
    first = ("target", "draft", "data", "device", "backend", "draft_length", "sweep")
    add_options(made, EvalOptions, {path: flags[path] for path in dict.fromkeys((*first, *flags))})
    return made


def run(words: Sequence[str]) -> int:
    options = read_options(parser(), EvalOptions, words)
    announce("torchspec eval: loading")

    from torchspec.cli.evaluation import evaluate_draft, show
    from torchspec.cli.target import check, load_target
    from torchspec.core.data.dataset import DatasetSettings, load_prompts
    from torchspec.core.decoding.evaluate import EvalSettings

    reads = [path for path in (options.chat_template, *options.draft.glob("*")) if path is not None]
    check(options, "decode", options.data, output=options.output, reads=reads)
    settings = EvalSettings(
        max_new_tokens=options.max_new_tokens,
        draft_length=options.draft_length,
        temperature=options.temperature,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    with ProgressDisplay() as progress:
        target = load_target(options)
        try:
            data = DatasetSettings(max_length=options.max_length)
            prompts = load_prompts(options.data, target.tokenizer, data, progress, count=options.samples)
            evaluation = evaluate_draft(
                target,
                options.draft,
                prompts,
                settings,
                progress,
                lengths=options.sweep,
                prompt_lookup=options.prompt_lookup,
            )
        finally:
            target.engine.close()
    if options.json_output:
        print(json.dumps(evaluation.to_json(), indent=2))
    else:
        show(evaluation)
    if options.output is not None:  # last: a full disk must not cost the figures
        evaluation.write(options.output)
    return 0
