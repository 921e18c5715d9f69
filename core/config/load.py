"""A checked run configuration from defaults, a YAML file and the command line, in rising order of precedence.

Every setting remembers where its value came from, and everything that is wrong is reported at once.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from torchspec.core import registry
from torchspec.core.config import environment, recipes, sources
from torchspec.core.config.fields import FLAGS, sections, settings
from torchspec.core.config.schema import RunConfig, Schema, with_draft
from torchspec.core.config.sources import COMMAND_LINE, Setting
from torchspec.core.config.validation import REQUIRED, validate
from torchspec.core.errors import ConfigError, Problem, TorchspecError

DEFAULT = "default"


def load_config(
    *,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    values_source: str = "python",
    probe: bool = True,
    planned: bool = False,
) -> tuple[RunConfig, dict[str, str]]:
    """The run configuration, and the source of every setting by its dotted path.

    file       YAML, or the name of a recipe that ships; its settings replace defaults
    values     nested mapping from Python; replaces the file's; provenance calls it `values_source`
    flags      dotted path -> value of the command line's own flags
    overrides  `section.key=value` words of the command line; the last of two wins
    probe      also check that the device and the backend can be used here and that the files named exist
    planned    what is configured may be for another machine: device and backend need not be usable here

    Raises ConfigError holding every problem found.
    """
    problems: list[Problem] = []
    layers: list[Setting] = []
    whole = True
    if file is not None:
        try:
            layers += sources.from_yaml(recipes.find(file))
        except ConfigError as error:
            problems += error.problems
            whole = False
    layers += sources.from_mapping(values or {}, values_source)
    given = [Setting(path=path, value=value, source=COMMAND_LINE) for path, value in (flags or {}).items()]
    words, faults = sources.from_overrides(overrides)
    twice = _contradictions(given, words)
    problems += faults + twice
    layers += given + words

    schema = _schema(layers, problems, RunConfig)
    config, tree, origin, faults = _checked(layers, schema, problems, label=lambda path: FLAGS.get(path, path))
    said = {problem.field for problem in twice}
    problems += [fault for fault in faults if fault.field not in said and (whole or fault.message != REQUIRED)]
    chosen = _device(tree, problems) if probe else None
    if probe:
        problems += environment.problems(tree, planned=planned)
    if problems or config is None:
        raise ConfigError(problems)
    provenance = {path: _origin(origin, path) for path in settings(schema)}
    if chosen is not None:
        name, provenance["device"] = chosen
        config = config.model_copy(update={"device": name})
    return config, provenance


def check_values(values: Mapping[str, Any], base: type[Schema]) -> tuple[Schema | None, list[Problem]]:
    """A model of `base`, which has `algorithm` and a `draft` section, from nested mappings; None and every problem."""
    problems: list[Problem] = []
    layers = sources.from_mapping(values, "python")
    schema = _schema(layers, problems, base)
    config, _, _, faults = _checked(layers, schema, problems, label=str)
    problems += faults
    return (None if problems else config), problems


def _checked(
    layers: Sequence[Setting], schema: type[Schema], problems: list[Problem], label: Callable[[str], str]
) -> tuple[Schema | None, dict[str, Any], dict[str, str], list[Problem]]:
    """(the model, the merged values, where each came from, what is wrong with them)."""
    known = _known(layers, schema, problems)
    tree, origin = _merge(known, schema)
    config, faults = validate(schema, tree, label=label, origin=origin)
    return config, tree, origin, faults


def _origin(origin: Mapping[str, str], path: str) -> str:
    """Where a setting came from; one whose value is a mapping may have come entry by entry."""
    entries = [source for given, source in origin.items() if given.startswith(f"{path}.")]
    return origin.get(path) or ", ".join(dict.fromkeys(entries)) or DEFAULT


def _contradictions(flags: Sequence[Setting], words: Sequence[Setting]) -> list[Problem]:
    """Settings, and entries of those that are mappings, that both name."""
    problems = []
    for flag in flags:
        given = {flag.path: flag.value}
        if isinstance(flag.value, Mapping):
            given |= {f"{flag.path}.{name}": value for name, value in flag.value.items()}
        for path, value in given.items():
            word = next((w for w in reversed(words) if w.path == path or w.path.startswith(f"{path}.")), None)
            if word is not None and (word.path == path or path != flag.path):
                said = f"given as {FLAGS.get(flag.path, flag.path)} ({value}) and as {word.path}={word.value}"
                problems.append(Problem(field=path, message=said, remedy="give one of them"))
    return problems


def _last(layers: Sequence[Setting], path: str) -> Setting | None:
    return next((setting for setting in reversed(layers) if setting.path == path), None)


def _schema(layers: Sequence[Setting], problems: list[Problem], base: type[Schema]) -> type[Schema]:
    """The schema with the algorithm's draft section; without one where the algorithm is unknown."""
    named = _last(layers, "algorithm")
    name = named.value if named else base.model_fields["algorithm"].default
    if not isinstance(name, str):
        return base  # the type error is reported with the others
    try:
        return with_draft(base, registry.algorithms().spec(name).options)
    except ConfigError as error:
        problems += error.problems
    except TorchspecError as error:
        problems.append(Problem(field="algorithm", value=name, message=str(error)))
    return base


def _known(layers: Sequence[Setting], schema: type[BaseModel], problems: list[Problem]) -> list[Setting]:
    """The layers without unknown settings and without values standing where a section belongs."""
    leaves, parts = settings(schema), sections(schema)
    kept: list[Setting] = []
    for setting in layers:
        ancestors = [setting.path[:i] for i, letter in enumerate(setting.path) if letter == "."]
        if setting.path in leaves or any(path in leaves for path in ancestors):
            kept.append(setting)
        elif setting.path not in parts:
            problems.append(_unknown(setting, [*leaves, *parts]))
        elif setting.value not in (None, {}):  # a section whose keys are all commented out is no error
            first = next(path for path in leaves if path.startswith(f"{setting.path}."))
            problems.append(
                Problem(
                    field=setting.path,
                    value=setting.value,
                    message=f"is a section of settings, not a value ({setting.source})",
                    remedy=f"name a setting in it, such as {first}",
                )
            )
    return kept


def _unknown(setting: Setting, paths: Sequence[str]) -> Problem:
    near = difflib.get_close_matches(setting.path, paths, n=3, cutoff=0.75)
    last = setting.path.rpartition(".")[2]
    by_name = {path.rpartition(".")[2]: path for path in paths}
    near += [by_name[name] for name in difflib.get_close_matches(last, by_name, n=2, cutoff=0.8)]
    section = setting.path.partition(".")[0]
    siblings = tuple(path for path in paths if path.startswith(f"{section}."))
    remedy = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "`torchspec train --help` lists them all"
    return Problem(
        field=setting.path,
        message=f"no such setting ({setting.source})",
        choices=() if near else siblings,
        remedy=remedy,
    )


def _merge(layers: Sequence[Setting], schema: type[BaseModel]) -> tuple[dict[str, Any], dict[str, str]]:
    tree: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path in sections(schema):
        _assign(tree, path, {})
    for setting in layers:
        _assign(tree, setting.path, setting.value)
        origin[setting.path] = setting.source
    return tree, origin


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for name in above:
        inner = tree.get(name)
        if not isinstance(inner, dict):
            inner = tree[name] = {}
        tree = inner
    tree[last] = copy.deepcopy(value)  # later entries are put into it


def _device(tree: Mapping[str, Any], problems: list[Problem]) -> tuple[str, str] | None:
    """The device a run without one gets, and why; None where one is configured."""
    if tree.get("device") is not None:
        return None
    try:
        return environment.default_device()
    except ConfigError as error:
        problems += error.problems
    except TorchspecError as error:
        problems.append(Problem(field="device", message=str(error)))
    return None
