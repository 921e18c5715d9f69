"""`torchspec bench`: algorithms side by side on the same data, each with the same number of FLOPs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from torchspec.cli.commands.quickstart import default_nproc, embedded_answers
from torchspec.cli.console import ProgressDisplay, announce, write_whole
from torchspec.cli.options import Parser, add_options, all_flags, collect_options
from torchspec.cli.schemas import TargetOptions
from torchspec.core.config.recipes import shipped
from torchspec.core.config.schema import Positive
from torchspec.core.errors import ConfigError, Problem, TorchspecError

if TYPE_CHECKING:
    from torchspec.cli.comparison import Cost
    from torchspec.core.config.schema import RunConfig

_WORDS = {"algorithms": "train a draft with each algorithm's recipe, decode with all of them, and compare"}
RECIPES = "algorithms"
RESULTS, TABLE = "results.json", "results.md"


class BenchOptions(TargetOptions):
    target: Path = Field(Path("embedded"), description="directory of the target, or `embedded`")
    output: Path = Field(Path("runs/algorithms"), description="directory of the runs and of the results")
    recipes: list[str] = Field(
        [], description="recipes that ship, by name, or YAML files; default: all that ship for the embedded target"
    )
    reference: str = Field("eagle3", description="the recipe whose steps the others' budget is counted in")
    steps: Positive = Field(366, description="steps of the reference; the others get as many as cost the same FLOPs")
    data: list[Path] = Field([], description="conversations to train on; default, for `embedded`: its own answers")
    held_out: list[Path] = Field([], description="conversations to decode; default, for `embedded`: those it ships")
    answers: Positive = Field(3000, description="answers of the embedded target to train on")
    samples: Positive = Field(24, description="held-out prompts decoded")
    max_new_tokens: Positive = Field(96, description="tokens generated per prompt")
    draft_length: Positive = Field(5, description="draft length at which acceptance lengths are compared")
    sweep: list[Positive] = Field([2, 3, 4, 5, 7], description="draft lengths among which the fastest is looked for")
    nproc: Positive | None = Field(None, description="processes that train; default: one per core on a CPU, up to 4")


def parser() -> Parser:
    listed = "\n".join(f"  {word}  {what}" for word, what in _WORDS.items())
    return Parser(
        "bench",
        "Measurements of this installation.",
        usage="torchspec bench COMMAND [options]",
        epilog=f"{listed}\n\n`torchspec bench COMMAND --help` describes one.",
    )


def parsers() -> dict[str, Parser]:
    """One per word that may follow."""
    made = Parser(
        "bench algorithms",
        "Train a draft with each recipe on the same data, each for the FLOPs that `--steps` of the reference recipe\n"
        "take (what the target costs is the same for all and is left out), decode the same held-out prompts with\n"
        f"every draft, and write {RESULTS}, {TABLE} and plots. Given again, it goes on where it stopped.",
    )
    add_options(made, BenchOptions, all_flags(BenchOptions))
    return {"algorithms": made}


def run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(parser().format_help())
        return 0
    if words[0] not in _WORDS:
        raise ConfigError([Problem(field=words[0], message="no such command", choices=tuple(_WORDS))])
    made = parsers()["algorithms"]
    options, loose, problems = collect_options(made, BenchOptions, words[1:])
    problems += made.surplus(loose)
    if options is not None:
        problems += _problems(options)
    if problems or options is None:
        raise ConfigError(problems)
    return _compare(options)


def _recipes(options: BenchOptions) -> dict[str, Path]:
    known = shipped(RECIPES)
    if not options.recipes:
        return known
    return {name if name in known else Path(name).stem: known.get(name, Path(name)) for name in options.recipes}


def _problems(options: BenchOptions) -> list[Problem]:
    problems, recipes = [], _recipes(options)
    for name, path in recipes.items():
        if not path.is_file():
            problems.append(
                Problem(
                    field="--recipes", value=name, message="no such recipe or file", choices=tuple(shipped(RECIPES))
                )
            )
    if options.reference not in recipes:
        message = "must be among the recipes that are compared"
        problems.append(Problem(field="--reference", value=options.reference, message=message, choices=tuple(recipes)))
    if str(options.target) != "embedded":
        for field, files in (("--data", options.data), ("--held-out", options.held_out)):
            if not files:
                problems.append(Problem(field=field, message=f"is needed for a target of yours ({options.target})"))
    return problems


def _compare(options: BenchOptions) -> int:
    announce(f"torchspec bench algorithms: {', '.join(_recipes(options))}, results in {options.output}")
    data, held_out = _data(options)
    costs = _costs(options, data)
    settings = options.model_dump(mode="json", exclude={"output", "recipes", "data", "held_out", "target"})
    results = _earlier(options.output / RESULTS, settings)
    for name, path in _recipes(options).items():
        if any(row["recipe"] == name for row in results["rows"]):
            announce(f"{name}: measured before")
            continue
        announce(f"{name}: {costs[name].steps} steps, {costs[name].flops / 1e9:.2f} GFLOP a sample")
        results["rows"].append(_measure(options, name, path, costs[name], data, held_out))
        _write(options.output, results)
    _write(options.output, results)
    from torchspec.cli.comparison import markdown

    print(markdown(results))
    announce(f"{options.output / RESULTS}, {options.output / TABLE}, plots beside them")
    return 0


def _data(options: BenchOptions) -> tuple[list[Path], list[Path]]:
    if options.data:
        return options.data, options.held_out
    data = options.output / "data"
    nproc = options.nproc or default_nproc(options.device)
    return embedded_answers(options, data, options.answers, nproc), options.held_out or [data / "test.jsonl"]


def _configure(options: BenchOptions, path: Path, data: Sequence[Path], values: dict[str, Any]) -> RunConfig:
    from torchspec.core.config.load import load_config

    given = {"output": options.output / "none", "data": {"train": list(data)}, "device": options.device, **values}
    target = {"path": options.target}
    config, _ = load_config(file=path, values={"target": target, **given}, values_source="bench")
    return config


def _costs(options: BenchOptions, data: Sequence[Path]) -> dict[str, Cost]:
    """What each recipe's step costs, from samples of the data."""
    from torchspec.cli.comparison import COUNTED_SAMPLES, Cost, flops_per_sample, steps_of
    from torchspec.core.data.dataset import DatasetSettings, TokenDataset, load_dataset
    from torchspec.core.data.tokenizer import load_tokenizer
    from torchspec.core.models.target_spec import read_target_spec, resolve_target

    path = resolve_target(options.target)
    spec = read_target_spec(path, options.trust_remote_code)
    counted: dict[str, tuple[float, int]] = {}
    datasets: dict[str, TokenDataset] = {}  # recipes mostly read the data alike
    for name, recipe in _recipes(options).items():
        config = _configure(options, recipe, data, {})
        reading = {key: getattr(config.target, key) for key in ("chat_template", "trust_remote_code", "thinking")}
        settings = DatasetSettings.of_training(config)
        alike = repr((reading, settings))
        if alike not in datasets:
            with ProgressDisplay() as progress:
                tokenizer = load_tokenizer(path, **reading)
                datasets[alike] = load_dataset(config.data.train, tokenizer, settings, progress)
        dataset = datasets[alike]
        samples = [dataset[place * len(dataset) // COUNTED_SAMPLES] for place in range(COUNTED_SAMPLES)]
        counted[name] = flops_per_sample(config, spec, samples)
    steps = steps_of({name: flops for name, (flops, _) in counted.items()}, options.reference, options.steps)
    return {
        name: Cost(flops=flops, parameters=parameters, steps=steps[name])
        for name, (flops, parameters) in counted.items()
    }


def _measure(
    options: BenchOptions, name: str, recipe: Path, cost: Cost, data: Sequence[Path], held_out: Sequence[Path]
) -> dict[str, Any]:
    from torchspec.cli.comparison import training_figures
    from torchspec.core.pipeline.launch import launch, torchspec_command

    output = options.output / name
    config = _configure(options, recipe, data, {"output": output})
    words = ["train", "--config", recipe, "--output", output, "--target", options.target, "--data", *data]
    words += ["--device", options.device] if options.device else []
    words += [f"train.max_steps={cost.steps}", "train.epochs=1000", "train.log_every=1", "eval.every=0"]
    code = launch(torchspec_command([str(word) for word in words]), options.nproc or default_nproc(options.device))
    if code:
        raise TorchspecError(f"the training of {name} ended with code {code}; its messages are above")
    return {
        "recipe": name,
        "algorithm": config.algorithm,
        "steps": cost.steps,
        "gflops_per_sample": cost.flops / 1e9,
        "parameters": cost.parameters,
        **training_figures(output / "metrics.jsonl"),
        **_decoded(options, output / "draft", config, held_out),
    }


def _decoded(options: BenchOptions, draft: Path, config: RunConfig, held_out: Sequence[Path]) -> dict[str, Any]:
    from torchspec.cli.evaluation import evaluate_draft
    from torchspec.cli.target import load_target
    from torchspec.core.data.dataset import DatasetSettings, load_prompts
    from torchspec.core.decoding.evaluate import EvalSettings

    settings = EvalSettings(max_new_tokens=options.max_new_tokens, draft_length=options.draft_length)
    with ProgressDisplay() as progress:
        target = load_target(options)
        try:
            reading = DatasetSettings.from_config(config.data)
            prompts = load_prompts(held_out, target.tokenizer, reading, progress, count=options.samples)
            found = evaluate_draft(target, draft, prompts, settings, progress, lengths=options.sweep)
        finally:
            target.engine.close()
    result, best = found.result.to_json(), found.sweep[found.best_draft_length].to_json()
    return {
        "acceptance_length": result["acceptance_length"],
        "acceptance_per_position": result["acceptance_per_position"],
        "best_draft_length": found.best_draft_length,
        "tokens_per_second": best["tokens_per_second"],
        "tokens_per_second_draftless": best["tokens_per_second_draftless"],
        "speedup": best["speedup"],
        "lossless": all(each.to_json()["lossless"] for each in found.sweep.values()),
    }


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Results that are there already, if they were measured in the same way."""
    fresh: dict[str, Any] = {"settings": settings, "machine": _machine(), "rows": []}
    if not path.exists():
        return fresh
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("settings") != settings:
        raise TorchspecError(f"{path} was measured with other settings: name another --output, or remove it")
    return found


def _machine() -> dict[str, Any]:
    import platform

    import torch

    from torchspec.core import settings

    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": settings.cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _write(output: Path, results: dict[str, Any]) -> None:
    from torchspec.cli.comparison import markdown, plots

    write_whole(output / RESULTS, json.dumps(results, indent=2) + "\n")
    write_whole(output / TABLE, markdown(results))
    for name, body in plots(results).items() if results["rows"] else ():
        (output / name).write_bytes(body)
