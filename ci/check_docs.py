"""Does the documentation hold? Relative links and anchors exist, every page of docs/ can be reached from the README,
and every `torchspec` command line in a shell block has only options and settings that there are."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from torchspec.cli import COMMANDS
from torchspec.cli.options import is_override
from torchspec.cli.reference import render
from torchspec.core import registry
from torchspec.core.config.fields import settings
from torchspec.core.config.schema import run_schema
from torchspec.core.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".venv", ".tox", ".tree", ".engines", "build", "dist", "node_modules"}

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (torchspec .*)$", re.MULTILINE)
_SHELL = ("bash", "sh", "console")


def pages() -> list[Path]:
    found = (path for path in ROOT.rglob("*.md") if not SKIPPED & set(path.relative_to(ROOT).parts))
    return sorted(found)


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    prose = _FENCE.sub("", text)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> Iterator[str]:
    yield from _LINK.findall(_FENCE.sub("", page.read_text()))


def broken_links(page: Path) -> list[str]:
    problems = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            problems.append(f"{page.relative_to(ROOT)}: {link} does not exist")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            problems.append(f"{page.relative_to(ROOT)}: {link} has no such heading")
    return problems


def unreachable() -> list[str]:
    """Pages of docs/ that no chain of links from the README leads to."""
    seen: set[Path] = set()
    open_pages = [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        if page in seen or not page.exists():
            continue
        seen.add(page)
        for link in links(page):
            path = link.partition("#")[0]
            target = (page.parent / path).resolve() if path and not re.match(r"[a-z]+:", link) else page
            open_pages += sorted(target.glob("*.md")) if target.is_dir() else [target] * (target.suffix == ".md")
    every = (ROOT / "docs").rglob("*.md")
    return [f"{page.relative_to(ROOT)}: no link leads here" for page in every if page not in seen]


def command_lines(page: Path) -> Iterator[str]:
    text = page.read_text()
    for language, block in _FENCE.findall(text):
        if language in _SHELL:
            joined = re.sub(r"\\\n\s*", " ", block)
            yield from (line for line in joined.splitlines() if line.lstrip("$ ").startswith("torchspec "))
    yield from _INDENTED.findall(re.sub(r"\\\n\s*", " ", _FENCE.sub("", text)))


def wrong_command(line: str) -> str:
    """What of a command line does not exist; values are not looked at."""
    words = [word for word in shlex.split(line.lstrip("$ "), comments=True) if word not in ("...", "…")][1:]
    if not words or words[0] in ("--help", "--version"):
        return ""
    name, *rest = words
    if name not in COMMANDS:
        return f"no command {name!r}"
    command = importlib.import_module(f"torchspec.cli.commands.{name}")
    parser = command.parser()
    if hasattr(command, "parsers") and rest:
        if rest[0] not in command.parsers():
            return f"no word {rest[0]!r} of {name}"
        parser = command.parsers()[rest.pop(0)]
    known = {option for action in parser.listed for option in action.option_strings} | {"--traceback", "--help"}
    unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known]
    paths = {path for algorithm in registry.algorithms().names() for path in _settings(algorithm)}
    unknown += [
        word for word in rest if is_override(word) and not any(_of(word.partition("=")[0], path) for path in paths)
    ]
    return f"unknown: {', '.join(unknown)}" if unknown else ""


@cache
def _settings(algorithm: str) -> tuple[str, ...]:
    return tuple(settings(run_schema(registry.algorithms().spec(algorithm).options)))


def _of(path: str, known: str) -> bool:
    return path == known or path.startswith(f"{known}.")


def main() -> int:
    problems = unreachable()
    for page in pages():
        problems += broken_links(page)
        for line in command_lines(page):
            try:
                wrong = wrong_command(line)
            except (ConfigError, ValueError) as error:
                wrong = str(error)
            if wrong:
                problems.append(f"{page.relative_to(ROOT)}: `{line.strip()}`: {wrong}")
    if (ROOT / "docs" / "cli.md").read_text() != render():
        problems.append("docs/cli.md is not current: python -m torchspec.cli.reference docs/cli.md")
    print("\n".join(problems) or f"{len(pages())} pages hold")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
