"""`torchspec report`: the HTML page of a run, or one that compares several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchspec.cli.options import Parser
from torchspec.core.errors import ConfigError


def parser() -> Parser:
    made = Parser(
        "report",
        "Write report.html into a run directory and print its path. Of several runs, write comparison.html into the\n"
        "first one's: curves over each other, figures with their differences to the first run, settings that differ.",
    )
    help_text = "the --output of a `torchspec train`; several are compared"
    made.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help=help_text)
    return made


def run(words: Sequence[str]) -> int:
    made = parser()
    options, loose, problems = made.split(words)
    problems += made.surplus(loose)
    if problems:
        raise ConfigError(problems)
    run_dirs = [Path(word) for word in options["run_dirs"]]
    if len(run_dirs) > 1:
        from torchspec.core.report.compare import write_comparison

        print(write_comparison(run_dirs))
    else:
        from torchspec.core.report.html import write_report

        print(write_report(run_dirs[0]))
    return 0
