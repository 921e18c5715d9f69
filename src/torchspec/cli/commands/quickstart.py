"""`torchspec quickstart`: from nothing to a measured draft."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from torchspec.cli.commands.prepare import prepare
from torchspec.cli.console import ProgressDisplay, announce
from torchspec.cli.options import Parser, add_options, all_flags, collect_options
from torchspec.cli.schemas import JsonOption, TargetOptions
from torchspec.cli.training import train
from torchspec.core.config.schema import Positive, RunConfig
from torchspec.core.errors import ConfigError

if TYPE_CHECKING:
    from torchspec.cli.evaluation import Evaluation

RECIPE = "quickstart.yaml"
GENERATED_TOKENS = 256
GENERATION_BATCH = 32


class QuickstartOptions(JsonOption):
    output: Path = Field(Path("runs/quickstart"), description="the run directory")
    device: str | None = Field(None, description="cpu, cuda, npu or a plug-in's name; default: what is here")
    generate: int = Field(
        0,
        ge=0,
        description="train on this many conversations answered by the target itself; 0: on the texts as they are",
    )
    samples: Positive = Field(16, description="held-out prompts decoded at the end")
    max_new_tokens: Positive = Field(128, description="tokens generated per prompt")
    sweep: list[Positive] = Field([1, 2, 3, 5, 7], description="draft lengths measured at the end", min_length=1)
    fresh: bool = Field(False, description="move an earlier run in the output directory aside and start anew")


def parser() -> Parser:
    made = Parser(
        "quickstart",
        "Build conversations from the Python standard library, train a draft for the embedded target on them, measure\n"
        "it by lossless speculative decoding on held-out ones, and write a report. Settings of the training can be\n"
        "given as for `torchspec train`. Given again, it continues a run that was stopped.",
        usage="torchspec quickstart [options] [section.key=value ...]",
    )
    add_options(made, QuickstartOptions, all_flags(QuickstartOptions))
    return made


def run(words: Sequence[str]) -> int:
    announce("torchspec quickstart: conversations, training, evaluation, report")
    options, overrides, problems = collect_options(parser(), QuickstartOptions, words)
    if options is not None:
        from torchspec.core.config import environment

        problems += environment.output_problems("--output", options.output)
    if problems or options is None:
        raise ConfigError(problems)
    if options.fresh:
        move_aside(options.output)
    data = options.output / "data"

    announce(f"1/4 conversations, from the standard library of this Python, in {data}")
    if not all((data / f"{split}.jsonl").exists() for split in ("train", "validation", "test")):
        prepare(data)
    config, provenance = _configure(options, data, overrides)
    if options.generate:
        config = _on_generated_text(options, config, data)
    announce(f"2/4 training in {options.output}; if it is stopped, the same command continues it")
    code = train(config, provenance)
    if code:
        return code
    announce("3/4 decoding held-out conversations with the draft and without it")
    evaluation = _evaluate(options, config, data)
    announce("4/4 report")
    evaluation.write(options.output / "eval.json")
    page = _report(options.output)
    _show(options, evaluation)
    announce(f"report  {page}\ndraft   {options.output / 'draft'}\nfigures {options.output / 'eval.json'}")
    return 0


def move_aside(output: Path) -> None:
    """Out of the way, not away: nobody's files are deleted."""
    if not output.exists():
        return
    number = 1
    while (aside := output.with_name(f"{output.name}.{number}")).exists():
        number += 1
    output.rename(aside)
    announce(f"the earlier run is now {aside}")


def _configure(options: QuickstartOptions, data: Path, overrides: Sequence[str]) -> tuple[RunConfig, dict[str, str]]:
    from torchspec.core.config.load import load_config

    files = {"train": [data / "train.jsonl"], "validation": [data / "validation.jsonl"]}
    values: dict[str, Any] = {"output": options.output, "data": files, "device": options.device}
    with resources.as_file(resources.files("torchspec") / "assets" / "recipes" / RECIPE) as recipe:
        return load_config(file=recipe, values=values, values_source="quickstart", overrides=overrides)


def _target_options(config: RunConfig) -> TargetOptions:
    reading = config.target.model_dump(exclude={"path"})
    return TargetOptions(target=config.target.path, device=config.device, backend=config.backend, **reading)


def _on_generated_text(options: QuickstartOptions, config: RunConfig, data: Path) -> RunConfig:
    """The configuration with the target's own words for training data, written first if they are not there yet."""
    from torchspec.cli.target import load_target
    from torchspec.core.decoding.regenerate import RegenerateSettings, regenerate

    announce(f"    {options.generate} of them are answered by the target itself")
    rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    count = min(options.generate, len(rows))
    asked, answered = data / f"asked-{count}.jsonl", data / f"generated-{count}.jsonl"
    # Evenly over the modules, which the file has in order.
    asked.write_text("".join(rows[place * len(rows) // count] for place in range(count)), encoding="utf-8")
    settings = RegenerateSettings(max_new_tokens=GENERATED_TOKENS, batch_size=GENERATION_BATCH)
    with ProgressDisplay() as progress:
        target = load_target(_target_options(config))
        try:
            regenerate(
                target.engine, target.tokenizer, [asked], answered, settings, dtype=target.dtype, progress=progress
            )
        finally:
            target.engine.close()
    return config.model_copy(update={"data": config.data.model_copy(update={"train": [answered]})})


def _evaluate(options: QuickstartOptions, config: RunConfig, data: Path) -> Evaluation:
    from torchspec.cli.evaluation import evaluate_draft
    from torchspec.cli.target import load_target
    from torchspec.core.data.dataset import DatasetSettings, load_prompts
    from torchspec.core.decoding.evaluate import EvalSettings

    settings = EvalSettings(max_new_tokens=options.max_new_tokens, draft_length=config.eval.draft_length)
    with ProgressDisplay() as progress:
        target = load_target(_target_options(config))
        try:
            reading = DatasetSettings.from_config(config.data)
            prompts = load_prompts([data / "test.jsonl"], target.tokenizer, reading, progress, count=options.samples)
            return evaluate_draft(
                target,
                options.output / "draft",
                prompts,
                settings,
                progress,
                lengths=options.sweep,
                prompt_lookup=True,
            )
        finally:
            target.engine.close()


def _report(output: Path) -> Path:
    from torchspec.core.report.html import write_report

    return write_report(output)


def _show(options: QuickstartOptions, evaluation: Evaluation) -> None:
    from torchspec.cli.evaluation import show

    if options.json_output:
        print(json.dumps(evaluation.to_json(), indent=2))
    else:
        show(evaluation)
