"""Command-line options made from typed schemas, so that each has one name, one description and one check."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from torchspec.core.config.fields import choices, default_text, settings, type_text
from torchspec.core.config.validation import validate
from torchspec.core.errors import ConfigError, Problem

Options = TypeVar("Options", bound=BaseModel)

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*=")
_METAVARS = dict.fromkeys(("data", "validation", "held_out", "results", "config", "chat_template"), "FILE")
_METAVARS |= dict.fromkeys(("device", "backend", "algorithm", "recipes", "reference"), "NAME")
_METAVARS |= dict.fromkeys(("base_model", "push_to_hub"), "OWNER/NAME")
_METAVARS |= dict.fromkeys(("engine", "conformance_backend"), "ENGINE")
_METAVARS |= {"conformance": "DEVICE", "topics": "TOPIC", "engine_url": "URL", "engine_options": "JSON"}


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print and exit."""

    def __init__(self, command: str, description: str, **arguments: Any) -> None:
        self.listed: list[argparse.Action] = []  # argparse's own __init__ adds --help
        super().__init__(
            prog=f"torchspec {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **arguments,
        )

    def add_argument(self, *names: Any, **shape: Any) -> argparse.Action:
        """As argparse's; also keeps what the generated reference lists."""
        action = super().add_argument(*names, **shape)
        self.listed.append(action)
        return action

    def error(self, message: str) -> NoReturn:
        named = re.fullmatch(r"argument (\S+): (.*)", message)
        field, text = named.groups() if named else (self.prog, message)
        raise ConfigError([Problem(field=field, message=text, remedy=f"see `{self.prog} --help`")])

    def split(self, words: Sequence[str]) -> tuple[dict[str, Any], list[str], list[Problem]]:
        """(values by destination, words that are no option, unknown options)."""
        space, rest = self.parse_known_args(list(words))
        values = vars(space)
        loose: list[str] = []
        for name, value in values.items():
            if isinstance(value, list):  # `--data a.jsonl train.lr=1`: argparse takes both for files
                kept = [item for item in value if not is_override(item)]
                loose += [item for item in value if is_override(item)]
                values[name] = kept
        problems: list[Problem] = []
        after_unknown = False
        for word in rest:
            if word.startswith("-"):
                problems.append(self._unknown(word.partition("=")[0]))
                after_unknown = "=" not in word
                continue
            if is_override(word) or not after_unknown:
                loose.append(word)
            after_unknown = False  # one word is taken for the unknown option's value
        return values, loose, problems

    def surplus(self, words: Sequence[str]) -> list[Problem]:
        """For commands that take no settings: every loose word is a mistake."""
        remedy = f"see `{self.prog} --help`"
        return [Problem(field=word, message="no such argument", remedy=remedy) for word in words]

    def _unknown(self, word: str) -> Problem:
        near = difflib.get_close_matches(word, self._option_string_actions, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"
        return Problem(field=word, message="no such option", remedy=remedy)


def is_override(word: str) -> bool:
    """Whether a word of the command line is `section.key=value` (and not the name of a file)."""
    return _OVERRIDE.match(word) is not None and not Path(word).exists()


def flag_of(path: str) -> str:
    """`draft_length` -> `--draft-length`; `json` is taken in Python, so the setting is `json_output`."""
    return "--json" if path == "json_output" else "--" + path.replace("_", "-")


def add_options(parser: Parser, schema: type[BaseModel], flags: Mapping[str, str]) -> None:
    """One option per entry of `flags` (dotted path -> flag), described by the schema's field."""
    fields = settings(schema)
    for path, flag in flags.items():
        info = fields[path]
        shape: dict[str, Any] = {"dest": path, "default": argparse.SUPPRESS, "help": help_text(info)}
        if info.annotation is bool:
            parser.add_argument(flag, action="store_true", **shape)
            continue
        shape["metavar"] = _metavar(flag, info)
        if get_origin(info.annotation) in (list, tuple):
            shape["nargs"] = "+"
        parser.add_argument(flag, **shape)


def help_text(info: FieldInfo) -> str:
    """Description, choices and default, as `--help` shows them."""
    parts = [info.description or ""]
    if choices(info):
        parts.append(f"({' | '.join(choices(info))})")
    default = default_text(info)
    if default == "required":
        parts.append("[required]")
    elif default not in ("null", "[]", "false"):
        parts.append(f"[default: {default}]")
    return " ".join(parts).replace("%", "%%")


def _metavar(flag: str, info: FieldInfo) -> str:
    name = flag.removeprefix("--").replace("-", "_")
    if name in _METAVARS:
        return _METAVARS[name]
    if choices(info):
        return name.upper()
    kind = type_text(info)
    if "path" in kind:
        return "PATH"
    return "N" if "number" in kind else "TEXT"


def all_flags(schema: type[BaseModel]) -> dict[str, str]:
    """A flag for every setting of a command's own schema."""
    return {path: flag_of(path) for path in settings(schema)}


def read_options(parser: Parser, schema: type[Options], words: Sequence[str]) -> Options:
    """The command's options, checked; ConfigError with everything that is wrong."""
    options, loose, problems = collect_options(parser, schema, words)
    problems += parser.surplus(loose)
    if problems or options is None:
        raise ConfigError(problems)
    return options


def collect_options(
    parser: Parser, schema: type[Options], words: Sequence[str]
) -> tuple[Options | None, list[str], list[Problem]]:
    """(options, words that are none, what is wrong so far), for commands that also take settings."""
    values, loose, problems = parser.split(words)
    for path, info in settings(schema).items():
        if "number" in type_text(info) and isinstance(values.get(path), list):  # `1 2 3` and `1,2,3` alike
            values[path] = [part for item in values[path] for part in item.split(",")]
    options, faults = validate(schema, values, label=flag_of)
    problems += [  # nobody types null: an option that is left out is as good
        dataclasses.replace(fault, field=flag_of(fault.field), message=fault.message.replace(" or null", ""))
        for fault in faults
    ]
    return options, loose, problems
