"""`torchspec report`: the HTML page of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchspec.cli.options import Parser
from torchspec.core.errors import ConfigError


def parser() -> Parser:
    made = Parser("report", "Write report.html into a run directory and print its path.")
    made.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the --output of a `torchspec train`")
    return made


def run(words: Sequence[str]) -> int:
    made = parser()
    options, loose, problems = made.split(words)
    problems += made.surplus(loose)
    if problems:
        raise ConfigError(problems)
    from torchspec.core.report.html import write_report

    print(write_report(options["run_dir"]))
    return 0
