"""Values against a schema: a checked model, or every problem in words of our own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from torchspec.core.config.fields import choices, entries, entry_text, sections, settings, type_text
from torchspec.core.errors import Problem

Model = TypeVar("Model", bound=BaseModel)
REQUIRED = "required"


def validate(
    schema: type[Model],
    tree: Mapping[str, Any],
    *,
    label: Callable[[str], str] = str,
    origin: Mapping[str, str] | None = None,
) -> tuple[Model | None, list[Problem]]:
    """The model, or None and what is wrong.

    `label` names what to give for a missing setting; `origin` says where a value came from. Both by dotted path.
    """
    found = _empty_paths(schema, tree)
    try:
        model = schema.model_validate(tree)
        return (None if found else model), found
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problem = _problem(detail, schema, tree, label, origin or {})
            # Each wrong item of one list, each way of being one entry: of these one whose own rule is broken says most.
            said = [place for place, other in enumerate(found) if _same(other, problem)]
            if not said:
                found.append(problem)
            elif _rule(detail) is not None:
                found[said[0]] = problem
        return None, found


def _same(one: Problem, other: Problem) -> bool:
    return (one.field, one.value) == (other.field, other.value)


def _rule(detail: ErrorDetails) -> ValueError | None:
    """A rule that the schema states in words of its own."""
    cause = detail.get("ctx", {}).get("error")
    return cause if isinstance(cause, ValueError) else None


def _empty_paths(schema: type[BaseModel], tree: Mapping[str, Any]) -> list[Problem]:
    """An empty path would be the working directory, which nobody who writes nothing asks for."""
    found = []
    for path, info in settings(schema).items():
        value = _value(tree, path)
        if "path" in type_text(info) and "" in (value if isinstance(value, list | tuple) else [value]):
            found.append(Problem(field=path, message="is empty", remedy="name a file or directory; . is this one"))
    return found


def _problem(
    detail: ErrorDetails,
    schema: type[BaseModel],
    tree: Mapping[str, Any],
    label: Callable[[str], str],
    origin: Mapping[str, str],
) -> Problem:
    leaves = settings(schema)
    path = _setting(detail, leaves, sections(schema))
    inside = detail["loc"][path.count(".") + 1 :]
    if detail["type"] == "missing" and not inside:
        return Problem(field=path, message=REQUIRED, remedy=f"give {label(path)}")
    info = leaves.get(path)
    given = _value(tree, path)
    if info is not None and inside and isinstance(given, Mapping):
        return _wrong_entry(path, info, str(inside[0]), given, origin, _rule(detail))
    source = f" ({origin[path]})" if path in origin else ""
    cause = _rule(detail)
    if cause is not None or info is None:
        value = None if info is None else detail["input"]
        return Problem(field=path, message=f"{cause or 'not valid'}{source}", value=value)
    allowed = choices(info)
    near = difflib.get_close_matches(str(detail["input"]), allowed, n=1)
    return Problem(
        field=path,
        message=f"must be {'one of the choices' if allowed else type_text(info)}{source}",
        value=detail["input"],
        choices=allowed,
        remedy=f"did you mean {near[0]}?" if near else "",
    )


def _wrong_entry(
    path: str,
    info: FieldInfo,
    name: str,
    given: Mapping[str, Any],
    origin: Mapping[str, str],
    rule: ValueError | None,
) -> Problem:
    """Of a setting that is a mapping, whose entries may have come one by one, or parts of them."""
    sources = [origin[at] for at in origin if at == path or f"{at}.".startswith(f"{path}.{name}.")]
    source = f" ({', '.join(dict.fromkeys(sources))})" if sources else ""
    names = entries(info)
    if names and name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        remedy = f"did you mean {near[0]}?" if near else ""
        return Problem(field=path, message=f"no such entry{source}", value=name, choices=names, remedy=remedy)
    message = f"must be {entry_text(info)}" if rule is None else str(rule)
    return Problem(field=f"{path}.{name}", message=f"{message}{source}", value=given.get(name))


def _value(tree: Mapping[str, Any], path: str) -> Any:
    value: Any = tree
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _setting(detail: ErrorDetails, leaves: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """The longest prefix of the error's location that is a setting or section; the rest is inside a value."""
    names = [str(part) for part in detail["loc"]]
    for end in range(len(names), 0, -1):
        path = ".".join(names[:end])
        if path in leaves or path in parts:
            return path
    return ".".join(names)
