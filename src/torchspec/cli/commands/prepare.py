"""`torchspec prepare`: conversations from text that every machine has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from torchspec.cli.console import ProgressDisplay, announce
from torchspec.cli.options import Parser, add_options, all_flags, read_options
from torchspec.core.config.schema import Section
from torchspec.core.errors import ConfigError, TorchspecError


class PrepareOptions(Section):
    output: Path = Field(
        Path("data/stdlib"), description="train.jsonl, validation.jsonl and test.jsonl are written here"
    )


def parser() -> Parser:
    made = Parser(
        "prepare",
        "Build conversations from the Python standard library of this interpreter: a function's or class's signature\n"
        "and docstring as the question and its source as the answer, or the other way round. Whole modules go to\n"
        "train, validation or test, so that nothing measured was trained on.",
    )
    add_options(made, PrepareOptions, all_flags(PrepareOptions))
    return made


def run(words: Sequence[str]) -> int:
    options = read_options(parser(), PrepareOptions, words)
    announce(f"reading the standard library, writing {options.output}")
    from torchspec.core.config import environment

    problems = environment.output_problems("--output", options.output)
    if problems:
        raise ConfigError(problems)
    with ProgressDisplay() as progress:
        prepare(options.output, progress)
    return 0


def prepare(directory: Path, progress: ProgressDisplay) -> dict[str, int]:
    """Write the three files; returns the rows of each split."""
    from torchspec.core.data.stdlib_corpus import write_jsonl

    try:
        counts = write_jsonl(directory, progress=progress)
    except OSError as error:
        raise TorchspecError(f"cannot write the conversations into {directory}: {error.strerror}") from error
    for split in ("train", "validation", "test"):
        announce(f"  {counts[split]:6d} conversations in {directory / split}.jsonl")
    if counts["skipped_files"]:
        announce(f"  {counts['skipped_files']} source files did not parse and were left out")
    return counts
