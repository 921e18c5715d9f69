"""`torchspec eval`: what a draft is worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torchspec.cli.console import ProgressDisplay, announce, write_whole
from torchspec.cli.options import Parser, add_options, all_flags, read_options
from torchspec.cli.schemas import EvalOptions
from torchspec.core.errors import ConfigError, Problem


def parser() -> Parser:
    made = Parser(
        "eval",
        "Measure a draft by lossless speculative decoding: every prompt is decoded with the draft and without it, and\n"
        "the texts are compared. The prompts are the conversations up to their last assistant turn.\n"
        "With --engine the draft is decoded in a real serving engine, which an environment of its own holds\n"
        "(`torchspec engine install`): the figures are its counters', held against our own decoder's.",
    )
    flags = all_flags(EvalOptions)
    first = ("target", "draft", "data", "device", "backend", "draft_length", "sweep", "engine")
    add_options(made, EvalOptions, {path: flags[path] for path in dict.fromkeys((*first, *flags))})
    return made


def run(words: Sequence[str]) -> int:
    options = read_options(parser(), EvalOptions, words)
    _refuse_what_does_not_apply(options)
    if options.track:
        from torchspec.core.pipeline.tracking import evaluation_problems

        if problems := evaluation_problems("--track", options.draft):
            raise ConfigError(problems)
    announce("torchspec eval: loading")
    from torchspec.core.pipeline.launch import follow_launcher

    follow_launcher()  # a training's measurement ends with the training
    if options.engine is not None:
        return _in_engine(options)

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
        with progress.phase("load target"):
            target = load_target(options)
        try:
            data = DatasetSettings(max_length=options.max_length)
            prompts = load_prompts(
                options.data, target.tokenizer, data, progress, count=options.samples, images=target.images
            )
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
    _track(options, evaluation.to_json())
    return 0


def _track(options: EvalOptions, figures: dict[str, Any]) -> None:
    from torchspec.core.pipeline.tracking import followed_run, track_evaluation

    if options.track and (run := followed_run(options.draft)) is not None:
        track_evaluation(run, figures)


def _refuse_what_does_not_apply(options: EvalOptions) -> None:
    """No option is taken and then ignored."""
    if options.engine is None:
        chosen = [name for name in options.model_fields_set if name.startswith("engine_") or name == "tolerance"]
        message, remedy = "means nothing without --engine", "give --engine too, or leave it out"
    else:
        chosen = [name for name in ("sweep", "prompt_lookup") if getattr(options, name)]
        message, remedy = "cannot be measured in a serving engine", "leave it out, or leave out --engine"
    if chosen:
        flags = [f"--{name.replace('_', '-')}" for name in sorted(chosen)]
        raise ConfigError([Problem(field=flag, message=message, remedy=remedy) for flag in flags])


def _in_engine(options: EvalOptions) -> int:
    from torchspec.cli.served import evaluate_served, show
    from torchspec.cli.target import check
    from torchspec.core.data.dataset import DatasetSettings, load_prompts
    from torchspec.core.data.tokenizer import load_tokenizer
    from torchspec.core.decoding.served import check_agreement
    from torchspec.core.models.target_spec import resolve_target

    reads = [path for path in (options.chat_template, *options.draft.glob("*")) if path is not None]
    check(options, "decode", options.data, output=options.output, reads=reads)
    with ProgressDisplay() as progress:
        tokenizer = load_tokenizer(
            resolve_target(options.target),
            chat_template=options.chat_template,
            trust_remote_code=options.trust_remote_code,
            thinking=options.thinking,
        )
        data = DatasetSettings(max_length=options.max_length)
        prompts = load_prompts(options.data, tokenizer, data, progress, count=options.samples)
        result = evaluate_served(options, prompts, progress)
    if options.json_output:
        print(json.dumps(result.to_json(), indent=2))
    else:
        show(result)
    if options.output is not None:
        write_whole(options.output, json.dumps(result.to_json(), indent=2) + "\n")
    _track(options, result.to_json())
    check_agreement(result, options.tolerance)  # last: what was measured is shown and kept
    return 0
