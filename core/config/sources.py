"""Where settings come from: a YAML file with line numbers, the command line, a Python mapping."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchspec.core.errors import ConfigError, Problem

COMMAND_LINE = "command line"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value under its dotted path. `source` is what the user reads: "run.yaml:12", "command line"."""

    path: str
    value: Any
    source: str


class _Loader(yaml.SafeLoader):
    """YAML's 1.2 scalars: 1e-3 is a number; `no`, `on` and 2026-01-02 are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own name


_SCALARS = (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


def add_scalars(kind: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    """Teach a loader or dumper the scalars of YAML 1.2's core schema."""
    for tag, pattern, first in _SCALARS:
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), first)


add_scalars(_Loader)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 1.2: a leading zero does not mean octal


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def from_yaml(file: Path) -> list[Setting]:
    """Every leaf of the file, in order.

    Raises ConfigError: unreadable, not YAML (with the line), or not a mapping of settings.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([Problem(field="--config", value=str(file), message=f"cannot be read: {reason}")]) from error
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return []
        return list(_walk(loader, root, "", file.name, ()))
    except yaml.YAMLError as error:
        raise ConfigError([_syntax_problem(error, file)]) from error
    finally:
        loader.dispose()


def _syntax_problem(error: yaml.YAMLError, file: Path) -> Problem:
    where = file.name
    message = "not valid YAML"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"{file.name}:{mark.line + 1}" if mark else where
        details = " ".join(part for part in (error.context, error.problem) if part)
        message = f"not valid YAML: {details}" if details else message
    return Problem(field=where, message=message, remedy="indent with spaces, and check brackets and quotes there")


def _walk(loader: _Loader, node: yaml.Node, prefix: str, name: str, above: tuple[yaml.Node, ...]) -> Iterator[Setting]:
    source = f"{name}:{node.start_mark.line + 1}"
    if node in above:
        raise ConfigError([Problem(field=source, message="an alias that contains itself")])
    if not isinstance(node, yaml.MappingNode):
        if not prefix:
            raise ConfigError(
                [Problem(field=source, message="a file of settings is a mapping of sections and settings")]
            )
        yield Setting(path=prefix, value=loader.construct_object(node, deep=True), source=source)
        return
    if node.tag != loader.DEFAULT_MAPPING_TAG:
        raise ConfigError([Problem(field=source, value=node.tag, message="a tag that files of settings don't use")])
    _refuse_repeated_keys(node, name)
    loader.flatten_mapping(node)
    if not node.value and prefix:
        yield Setting(path=prefix, value={}, source=source)
    for key, value in node.value:
        path = f"{prefix}.{key.value}" if prefix else str(key.value)
        if isinstance(value, yaml.MappingNode):
            yield from _walk(loader, value, path, name, (*above, node))
        else:
            item = loader.construct_object(value, deep=True)
            yield Setting(path=path, value=item, source=f"{name}:{key.start_mark.line + 1}")


def _refuse_repeated_keys(node: yaml.MappingNode, name: str) -> None:
    """YAML readers keep the last of two equal keys without a word."""
    seen: dict[str, int] = {}
    problems: list[Problem] = []
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            problems.append(Problem(field=f"{name}:{line}", message="a key must be plain text"))
        elif key.tag != "tag:yaml.org,2002:merge" and seen.setdefault(key.value, line) != line:
            first = seen[key.value]
            problems.append(Problem(field=f"{name}:{line}", value=key.value, message=f"already given in line {first}"))
    if problems:
        raise ConfigError(problems)


def from_mapping(values: Mapping[str, Any], source: str, prefix: str = "") -> list[Setting]:
    """The leaves of nested mappings; an empty mapping is kept as a value."""
    found: list[Setting] = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found.extend(from_mapping(value, source, f"{path}."))
        else:
            found.append(Setting(path=path, value=value, source=source))
    return found


def from_overrides(overrides: Sequence[str]) -> tuple[list[Setting], list[Problem]]:
    """`section.key=value` words of a command line, values read as YAML; also what is wrong with them."""
    found: list[Setting] = []
    problems: list[Problem] = []
    for word in overrides:
        path, equals, text = word.partition("=")
        if not equals or not path:
            problems.append(Problem(field=word, message="not a setting", remedy="write section.key=value"))
            continue
        try:
            value = parse_value(text)
        except yaml.YAMLError:
            problems.append(
                Problem(
                    field=path,
                    value=text,
                    message="not a YAML value",
                    remedy="close its brackets and quotes, or quote it whole: 'key=\"value\"'",
                )
            )
            continue
        found.extend(from_mapping({path: value}, COMMAND_LINE))
    return found, problems


def parse_value(text: str) -> Any:
    """One YAML value: 3, 1e-3, true, null, text, [a, b], {a: 1}."""
    return yaml.load(text, Loader=_Loader)
