"""`torchspec capture`: the features of a target, once, for many trainings."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from torchspec.cli.console import ProgressDisplay, announce
from torchspec.cli.options import Parser, add_options
from torchspec.core.config.fields import FLAGS
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import ConfigError

OPTIONS = ("target.path", "data.train", "device", "backend", "engine.python", "engine.url", "algorithm")

_INTRODUCTION = """\
Have the target read every sample of the data and write its hidden states into a directory, one record for each sample.
Trainings read them with `pipeline.topology=offline pipeline.features=OUTPUT` and load no target. A capture that was
stopped goes on when the same command is given again; whole records are kept, damaged ones are made again.

The configuration is that of `torchspec train`, and a file of it can be shared (--config). Used are device, backend,
algorithm, seed, data, draft and engine settings, how the target is read, and what decides the shapes in which the
target runs: train.batch_size, train.micro_batch_size, train.tokens_per_rank, parallel.ulysses and parallel.ring. With
these as in the training, the first epoch on the features is the same to the last bit as one with the hf engine inside.
Other settings are passed over where they stand in a file, and refused on the command line.

One process and one engine capture. A target that needs several devices takes backend=vllm or sglang with
engine.tensor_parallel; target.tensor_parallel is for training."""


class CaptureDisplay(ProgressDisplay):
    """With tokens per second, of this session."""

    def __init__(self) -> None:
        super().__init__()
        self._first: tuple[float, int] | None = None
        self._done = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        from torchspec.core.pipeline.capture import STAGE

        if stage == STAGE:
            self._first = self._first or (time.monotonic(), done)
            self._done = done
        super().__call__(stage, done, total)

    def _current(self, stage: str) -> str:
        from torchspec.core.pipeline.capture import STAGE

        if self._first is None or stage != STAGE:
            return ""
        since, before = self._first
        seconds = time.monotonic() - since
        return f"{(self._done - before) / seconds:.0f} tokens/s" if self._done > before else ""


def parser() -> Parser:
    made = Parser("capture", _INTRODUCTION, usage="torchspec capture [options] [section.key=value ...]")
    add_options(made, RunConfig, {path: FLAGS[path] for path in OPTIONS})
    made.add_argument(
        "--output", metavar="PATH", default=argparse.SUPPRESS, help="the directory of the features [required]"
    )
    made.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings, a training's if you like")
    made.epilog = "`torchspec train --help` lists the settings (section.key=value)."
    return made


def run(words: Sequence[str]) -> int:
    values, overrides, problems = parser().split(words)
    file = values.pop("config")
    from torchspec import __version__

    announce(f"torchspec {__version__}: checking the configuration")
    from torchspec.core.config.load import load_config

    try:  # unprobed: files and adapters are looked at where they are used
        config, provenance = load_config(file=file, flags=values, overrides=overrides, probe=False)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    from torchspec.core.pipeline.capture import capture
    from torchspec.core.pipeline.capture_config import idle_problems

    problems += idle_problems(provenance)
    if problems:
        raise ConfigError(problems)
    with CaptureDisplay() as progress:
        outcome = capture(config, progress=progress)
    counted = f"{outcome.captured} of {outcome.samples} samples captured"
    if outcome.signal:
        announce(f"stopped: {counted}; the same command goes on")
        return outcome.exit_code
    lost = f", {outcome.quarantined} could not be (why: manifest.json)" if outcome.quarantined else ""
    announce(f"{counted} ({outcome.kept} were there){lost}: {outcome.nbytes / 1e9:.3f} GB in {outcome.directory}")
    return 0
