"""The schema as a flat table: every setting by its dotted path, with its type in words."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

# Settings common enough to have a flag of their own on the command line.
FLAGS = {
    "output": "--output",
    "device": "--device",
    "backend": "--backend",
    "pipeline.topology": "--topology",
    "pipeline.engines": "--engines",
    "engine.tensor_parallel": "--engine-tensor-parallel",
    "pipeline.trainers": "--trainers",
    "on_policy.enabled": "--on-policy",
    "engine.python": "--engine-python",
    "engine.url": "--engine-url",
    "algorithm": "--algorithm",
    "draft.objective": "--objective",
    "target.path": "--target",
    "data.train": "--data",
    "data.validation": "--validation",
}

_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "truth values"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
}


def sections(schema: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Dotted path -> model of every nested section, outer before inner."""
    return dict(_sections(schema, ""))


def _sections(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, info in schema.model_fields.items():
        model = _section(info)
        if model is not None:
            yield prefix + name, model
            yield from _sections(model, f"{prefix}{name}.")


def _section(info: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that holds settings of its own."""
    model: object = info.annotation
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def settings(schema: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted path -> field of every leaf, in the order of the schema."""
    found: dict[str, FieldInfo] = {}
    for name, info in schema.model_fields.items():
        model = _section(info)
        if model is not None:
            found |= settings(model, f"{prefix}{name}.")
        else:
            found[prefix + name] = info
    return found


def entry_text(info: FieldInfo) -> str:
    """What each value of a setting that is a mapping must be."""
    return _describe(get_args(info.annotation)[1], (), many=False)


def choices(info: FieldInfo) -> tuple[str, ...]:
    """The values of a closed choice, else ()."""
    return tuple(str(value) for part in _union_members(info.annotation) for value in _literal_values(part))


def entries(info: FieldInfo) -> tuple[str, ...]:
    """The names that a mapping may have, where they are a closed choice, else ()."""
    if get_origin(info.annotation) is not dict:
        return ()
    return tuple(str(name) for name in _literal_values(get_args(info.annotation)[0]))


def type_text(info: FieldInfo) -> str:
    """What a value must be, e.g. "a whole number >= 1 or null"."""
    return _describe(info.annotation, tuple(info.metadata), many=False)


def default_text(info: FieldInfo) -> str:
    """The default as YAML writes it; "required" where there is none."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(str(item) for item in value) + "]"
    return str(value)


def _union_members(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _literal_values(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _describe(annotation: Any, metadata: tuple[object, ...], *, many: bool) -> str:
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return _describe(inner, metadata + _constraints(extra), many=many)
    members = _union_members(annotation)
    if len(members) > 1:
        return " or ".join(
            "null" if member is type(None) else _describe(member, metadata, many=many) for member in members
        )
    values = _literal_values(annotation)
    if values:
        return "one of " + ", ".join(str(value) for value in values)
    if get_origin(annotation) in (list, tuple):
        return _describe_list(annotation, metadata)
    if get_origin(annotation) is dict:
        keys, values = get_args(annotation)
        least = max((part.min_length for part in metadata if isinstance(part, MinLen | Len)), default=0)
        if keys is str:
            return f"{_describe(values, (), many=True)} by name"
        allowed = ", ".join(str(key) for key in _literal_values(keys)) or _describe(keys, (), many=True)
        return f"a mapping of at least {least} of {allowed} to {_describe(values, (), many=True)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        parts = (f"{name}: {type_text(info)}" for name, info in annotation.model_fields.items())
        return "{" + ", ".join(parts) + "}"
    single, plural = _WORDS.get(annotation, ("a value", "values"))
    return (plural if many else single) + _bounds(metadata)


def _describe_list(annotation: Any, metadata: tuple[object, ...]) -> str:
    items = get_args(annotation)
    if get_origin(annotation) is tuple and Ellipsis not in items:
        return f"a list of {len(items)} {_describe(items[0], (), many=True)}"
    least = max((part.min_length for part in metadata if isinstance(part, MinLen | Len)), default=0)
    count = f" (at least {least})" if least else ""
    return f"a list of {_describe(items[0], (), many=True)}{count}"


def _constraints(extra: list[object]) -> tuple[object, ...]:
    found: list[object] = []
    for part in extra:
        found.extend(part.metadata if isinstance(part, FieldInfo) else [part])
    return tuple(found)


def _bounds(metadata: tuple[object, ...]) -> str:
    low = next((f">= {_bound(m.ge)}" for m in metadata if isinstance(m, Ge)), "")
    low = next((f"> {_bound(m.gt)}" for m in metadata if isinstance(m, Gt)), low)
    high = next((f"<= {_bound(m.le)}" for m in metadata if isinstance(m, Le)), "")
    high = next((f"< {_bound(m.lt)}" for m in metadata if isinstance(m, Lt)), high)
    both = " and ".join(part for part in (low, high) if part)
    return f" {both}" if both else ""


def _bound(value: Any) -> str:
    """2**63 says more than its 19 digits."""
    power = isinstance(value, int) and value > 2**32 and value.bit_count() == 1
    return f"2**{value.bit_length() - 1}" if power else str(value)
