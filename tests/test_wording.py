"""What people read: one word for one thing, and descriptions and messages of one form."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchspec.cli import COMMANDS
from torchspec.core import registry
from torchspec.core.config.fields import settings
from torchspec.core.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("src", "core", "backends", "devices")

OTHER_WORDS = {
    r"\bfolders?\b": "directory",
    r"\brun files?\b": "recipe, or file of settings",
    r"\boutput directory\b": "run directory",
    r"\b(?:tokeniz(?:e|ed|es)|normaliz\w*|initializ\w*)\b": "tokenise, normalise, initialise",
    r"\bchain (?:of|length)\b": "draft length",
    r"\bacceptance rate\b|\baccepted length\b": "acceptance length",
    r"\bstudents?\b": "draft",
}
"""Beside docs/concepts.md: what a thing is not called, and its word."""


def _said(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is not a docstring; what an f-string puts in is an ellipsis."""
    passed_over: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            passed_over.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            passed_over.update(id(part) for part in ast.walk(node) if part is not node)
    for node in ast.walk(tree):
        if id(node) in passed_over:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
            yield node.lineno, "".join(parts)


def _modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def _other_words(text: str) -> list[str]:
    """Each word that is another's, with the one to use. A single word is no prose, but a name."""
    if len(text.split()) < 2:
        return []
    found = ((match, word) for pattern, word in OTHER_WORDS.items() for match in re.findall(pattern, text, re.I))
    return [f"{match}: say {word}" for match, word in found]


def test_one_word_for_one_thing() -> None:
    assert _other_words("a folder of the output directory") == [
        "folder: say directory",
        "output directory: say run directory",
    ]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {each}"
        for path in _modules()
        for line, text in _said(ast.parse(path.read_text(encoding="utf-8")))
        for each in _other_words(text)
    ]
    assert not found


def _begins_with_a_class(raised: ast.Raise) -> bool:
    """Whether the message of a new exception begins with `{type(error).__name__}`, which says nothing to its reader."""
    call = raised.exc
    if not (isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.JoinedStr)):
        return False
    return ast.unparse(call.args[0])[2:].startswith("{type(error).__name__}:")


def test_no_message_begins_with_the_class_of_an_exception() -> None:
    planted = ast.parse('raise TargetError(f"{type(error).__name__}: {error}")').body[0]
    assert isinstance(planted, ast.Raise)
    assert _begins_with_a_class(planted)
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in _modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and _begins_with_a_class(node)
    ]
    assert not found


def _described() -> Iterator[tuple[str, str]]:
    """(name, description) of every option of every command, every setting, and every setting of each draft."""
    for name in COMMANDS:
        command = importlib.import_module(f"torchspec.cli.commands.{name}")
        parsers = command.parsers() if hasattr(command, "parsers") else {"": command.parser()}
        for word, parser in parsers.items():
            for action in parser.listed:
                if not isinstance(action, argparse._HelpAction):
                    option = ", ".join(action.option_strings) or action.dest
                    text = re.sub(r" (\[[^\]]*\]|\([^)]* \| [^)]*\))", "", (action.help or "").replace("%%", "%"))
                    yield f"torchspec {name} {word} {option}", text.strip("] ")
    for path, info in settings(RunConfig).items():
        if path != "draft":
            yield path, info.description or ""
    for name in registry.algorithms().names():
        for path, info in settings(registry.algorithms().spec(name).options).items():
            yield f"draft.{path} of {name}", info.description or ""


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("no description", r""),
        ("ends with a full stop", r".*\."),
        ("says of what, and not what", r"of .*"),
        ("says a default alone", r"(default|0|null): .*"),
    ],
)
def test_descriptions_say_what_in_a_phrase(fault: str, pattern: str) -> None:
    found = [name for name, text in _described() if re.fullmatch(pattern, text, re.S)]
    assert not found, fault
