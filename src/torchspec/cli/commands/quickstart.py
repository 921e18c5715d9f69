"""`torchspec quickstart`: from nothing to a measured draft."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import Field

from torchspec.cli.commands.prepare import prepare
from torchspec.cli.console import ProgressDisplay, announce
from torchspec.cli.options import Parser, add_options, all_flags, collect_options
from torchspec.cli.schemas import JsonOption, TargetOptions
from torchspec.cli.training import train
from torchspec.core.config.schema import Positive, RunConfig, TargetReading
from torchspec.core.errors import ConfigError, Problem, TorchspecError

if TYPE_CHECKING:
    from torchspec.cli.evaluation import Evaluation

RECIPE = "quickstart.yaml"
ANSWERS = "answers.jsonl.xz"  # beside the embedded target: what it has answered before
GENERATED_TOKENS = 192
GENERATION_BATCH = 96
MOST_RANKS = 4
_PLACEHOLDER = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


class QuickstartOptions(JsonOption):
    output: Path = Field(Path("runs/quickstart"), description="the run directory")
    device: str | None = Field(None, description="cpu, cuda, npu or a plug-in's name; default: what is here")
    nproc: Positive | None = Field(
        None, description="processes that answer and train; default: one per core on a CPU, up to 4, else 1"
    )
    answers: int = Field(
        3000,
        ge=0,
        description="train on this many conversations answered by the target itself (most answers of the embedded one "
        "are remembered); 0: on the conversations as they are",
    )
    samples: Positive = Field(24, description="held-out prompts decoded at the end")
    max_new_tokens: Positive = Field(128, description="tokens generated per prompt")
    sweep: list[Positive] = Field([1, 2, 3, 5], description="draft lengths measured at the end", min_length=1)
    fresh: bool = Field(False, description="move an earlier run in the run directory aside and start anew")


def parser() -> Parser:
    made = Parser(
        "quickstart",
        "Build conversations from the Python standard library, let the embedded target answer some of them, train a\n"
        "draft on its answers, measure it by lossless speculative decoding on held-out prompts, and write a report.\n"
        "Settings of the training can be given as for `torchspec train`. Given again, it continues a run that was\n"
        "stopped.",
        usage="torchspec quickstart [options] [section.key=value ...]",
    )
    add_options(made, QuickstartOptions, all_flags(QuickstartOptions))
    return made


def run(words: Sequence[str]) -> int:
    announce("torchspec quickstart: conversations, answers, training, evaluation, report")
    options, overrides, problems = collect_options(parser(), QuickstartOptions, words)
    problems += _setting_problems(options, overrides)
    if problems or options is None:
        raise ConfigError(problems)
    if options.fresh:
        move_aside(options.output)
    data = options.output / "data"

    announce(f"1/5 conversations, from the standard library of this Python, in {data}")
    write_conversations(data)
    train_files = [data / "train.jsonl"]
    config, _ = _configure(options, data, train_files, overrides)
    nproc = options.nproc or default_nproc(config.device)
    if options.answers:
        train_files = _answers(options, config, data, nproc)
    else:
        announce("2/5 answers: the texts as they are")
    announce(f"3/5 training in {options.output}; if it is stopped, the same command continues it")
    code = _train(options, data, train_files, overrides, nproc)
    if code:
        return code
    from torchspec.core.pipeline.card import put_result
    from torchspec.core.pipeline.tracking import track_evaluation

    announce("4/5 decoding held-out conversations with the draft and without it")
    evaluation = _evaluate(options, config, data)
    _show(options, evaluation)  # first: a full disk must not cost the figures
    announce("5/5 report")
    evaluation.write(options.output / "eval.json")
    put_result(options.output / "draft", "held-out prompts", evaluation.to_json())
    if config.train.trackers:
        track_evaluation(options.output, evaluation.to_json())
    page = _report(options.output)
    announce(f"report  {page}\ndraft   {options.output / 'draft'}\nfigures {options.output / 'eval.json'}")
    return 0


def write_conversations(data: Path) -> None:
    """Those of this Python's standard library, if they are not there."""
    if not all((data / f"{split}.jsonl").exists() for split in ("train", "validation", "test")):
        with ProgressDisplay() as progress:
            prepare(data, progress)


def _setting_problems(options: QuickstartOptions | None, overrides: Sequence[str]) -> list[Problem]:
    """All that the training would refuse, asked before anything is touched; `options`: None if they are wrong."""
    from torchspec.core.pipeline.device_fit import Ranks
    from torchspec.core.pipeline.preflight import check

    problems = [] if options is None else _output_problems(options)
    with TemporaryDirectory() as place:
        data = Path(place) / "data"  # in place of conversations that are yet to be written
        data.mkdir()
        for split in ("train", "validation"):
            (data / f"{split}.jsonl").write_text(_PLACEHOLDER, encoding="utf-8")
        asked = options or QuickstartOptions(fresh=True)
        if asked.fresh or problems:
            asked = asked.model_copy(update={"output": Path(place) / "run"})
        try:
            config, _ = _configure(asked, data, [data / "train.jsonl"], overrides)
            nproc = asked.nproc or default_nproc(config.device)
            earlier = asked.output / "data"
            count = len(_rows(earlier)) if (earlier / "train.jsonl").exists() else asked.answers
            files = _train_files(asked, data, count, nproc)
            for file in files:
                file.write_text(_PLACEHOLDER, encoding="utf-8")
            named = config.data.model_copy(update={"train": files})
            check(config.model_copy(update={"data": named}), Ranks(all=nproc, here=nproc, launched=False))
        except ConfigError as error:
            problems += error.problems
    return problems


def _output_problems(options: QuickstartOptions) -> list[Problem]:
    from torchspec.core.config import environment
    from torchspec.core.pipeline.run_dir import is_run

    output = options.output
    if is_run(output) and not (output / "data" / "train.jsonl").exists() and not options.fresh:
        message = "holds a run that quickstart did not start"
        remedy = "name another directory, or give --fresh to move that run aside"
        return [Problem(field="--output", value=str(output), message=message, remedy=remedy)]
    return environment.output_problems("--output", output.parent if options.fresh else output)


def move_aside(output: Path) -> None:
    """Out of the way, not away: nobody's files are deleted."""
    if not output.exists():
        return
    number = 1
    while (aside := output.with_name(f"{output.name}.{number}")).exists():
        number += 1
    try:
        output.rename(aside)
    except OSError as error:
        raise TorchspecError(
            f"{output} cannot be moved to {aside} ({error.strerror}): name another --output"
        ) from error
    announce(f"the earlier run is now {aside}")


def _recipe() -> AbstractContextManager[Path]:
    return resources.as_file(resources.files("torchspec") / "assets" / "recipes" / RECIPE)


def _configure(
    options: QuickstartOptions, data: Path, train_files: Sequence[Path], overrides: Sequence[str]
) -> tuple[RunConfig, dict[str, str]]:
    from torchspec.core.config.load import load_config

    files = {"train": list(train_files), "validation": [data / "validation.jsonl"]}
    values: dict[str, Any] = {"output": options.output, "data": files, "device": options.device}
    with _recipe() as recipe:
        return load_config(file=recipe, values=values, values_source="quickstart", overrides=overrides)


def default_nproc(device: str | None) -> int:
    """A small model on a CPU gains nothing from a second thread, and everything from a second process."""
    from torchspec.core import registry, settings

    name, _ = registry.choose_device(device, settings.default_device())
    return min(settings.cores(), MOST_RANKS) if name == "cpu" else 1


def _train(
    options: QuickstartOptions, data: Path, train_files: Sequence[Path], overrides: Sequence[str], nproc: int
) -> int:
    if nproc == 1:
        return train(*_configure(options, data, train_files, overrides))
    from torchspec.core.pipeline.launch import launch, torchspec_command

    with _recipe() as recipe:
        words = ["train", "--config", recipe, "--output", options.output, "--validation", data / "validation.jsonl"]
        words += ["--data", *train_files, *(["--device", options.device] if options.device else []), *overrides]
        return launch(torchspec_command([str(word) for word in words]), nproc)


def _target_options(config: RunConfig) -> TargetOptions:
    reading = config.target.model_dump(include=set(TargetReading.model_fields))
    return TargetOptions(target=config.target.path, device=config.device, backend=config.backend, **reading)


def _rows(data: Path) -> list[str]:
    return (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)


def _train_files(options: QuickstartOptions, data: Path, rows: int, nproc: int) -> list[Path]:
    """What is trained on: the answers, in a file per process that writes them, or the texts as they are."""
    if not options.answers:
        return [data / "train.jsonl"]
    return answer_files(data, min(options.answers, rows), nproc)


def answer_files(data: Path, count: int, nproc: int) -> list[Path]:
    """Where `count` answers stand, in a file per process that writes them."""
    return [data / f"generated-{count}-{part}.jsonl" for part in range(min(nproc, count))]


def embedded_answers(target: TargetOptions, data: Path, count: int, nproc: int) -> list[Path]:
    """Conversations of the standard library in `data`, so many of them answered by the target; made if missing."""
    write_conversations(data)
    rows = _rows(data)
    return answers(target, data, rows, answer_files(data, min(count, len(rows)), nproc))


def _answers(options: QuickstartOptions, config: RunConfig, data: Path, nproc: int) -> list[Path]:
    """Files of conversations answered by the target itself, one per process, written first if they are not there."""
    rows = _rows(data)
    count = min(options.answers, len(rows))
    announce(f"2/5 answers: the target writes its own to {count} of them, the text a draft learns most from")
    return answers(_target_options(config), data, rows, _train_files(options, data, len(rows), nproc))


def answers(target: TargetOptions, data: Path, rows: Sequence[str], files: Sequence[Path]) -> list[Path]:
    """Have the target answer as many of the conversations as the files' names say, a file per process; -> `files`."""
    nproc, count = len(files), int(files[0].stem.split("-")[1])
    # Evenly over the modules, which the file has in order.
    chosen = [rows[place * len(rows) // count] for place in range(count)]
    parts = []
    for part, answered in enumerate(files):
        asked = data / f"asked-{count}-{part}.jsonl"
        asked.write_text("".join(chosen[part::nproc]), encoding="utf-8")
        parts.append((asked, answered))
    with (
        ProgressDisplay() as progress,
        ProcessPoolExecutor(nproc, mp_context=get_context("spawn")) as processes,
    ):
        others = [processes.submit(_answer, target, asked, answered) for asked, answered in parts[1:]]
        _answer(target, *parts[0], progress, alone=not others)
        for other in others:
            other.result()
    return list(files)


def _answer(
    options: TargetOptions, asked: Path, answered: Path, progress: ProgressDisplay | None = None, *, alone: bool = False
) -> None:
    """Have the target answer one file; with one thread, unless this is the only process."""
    import torch

    from torchspec.cli.target import load_target
    from torchspec.core.decoding.regenerate import RegenerateSettings, regenerate
    from torchspec.core.decoding.remembered import RememberingWriter, read_answers

    threads = torch.get_num_threads()
    if not alone:
        torch.set_num_threads(1)
    settings = RegenerateSettings(max_new_tokens=GENERATED_TOKENS, batch_size=GENERATION_BATCH)
    target = load_target(options)
    writer = RememberingWriter(target.engine, read_answers(target.path / ANSWERS, target.path, GENERATED_TOKENS))
    try:
        regenerate(writer, target.tokenizer, [asked], answered, settings, dtype=target.dtype, progress=progress)
    finally:
        target.engine.close()
        torch.set_num_threads(threads)


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
