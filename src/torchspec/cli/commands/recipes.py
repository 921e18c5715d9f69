"""`torchspec recipes`: the files of settings that ship, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torchspec.cli.options import Parser
from torchspec.core.config.recipes import shipped, title, unknown
from torchspec.core.errors import ConfigError

_KINDS = (
    ("targets", "for published targets"),
    ("algorithms", "for the embedded target, one for each algorithm"),
    ("", "for the embedded target"),
)


def parser() -> Parser:
    made = Parser(
        "recipes",
        "List the recipes that ship, which `torchspec train --config NAME` takes, or print one to read or to change.",
    )
    made.add_argument("name", metavar="NAME", nargs="?", help="the recipe to print; default: list all")
    return made


def run(words: Sequence[str]) -> int:
    made = parser()
    options, loose, problems = made.split(words)
    problems += made.surplus(loose)
    name, known = options["name"], shipped()
    if name is not None and name not in known:
        problems.append(unknown("NAME", name, "no such recipe"))
    if problems:
        raise ConfigError(problems)
    if name is not None:
        print(known[name].read_text(encoding="utf-8"), end="")
        return 0
    width = max(map(len, known))
    for kind, what in _KINDS:
        print(f"{what}:")
        for name, file in shipped(kind).items():
            print(f"  {name:<{width}}  {title(file)}")
        print()
    print("`torchspec train --config NAME --target DIR --data FILE --output DIR` uses one; settings may follow.")
    return 0
