"""The recipes that ship: files of settings that `--config` takes by their names."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from torchspec.core.errors import ConfigError, Problem

KINDS = ("targets", "algorithms", "")
"""Folders of `assets/recipes`: for published targets, for the embedded one by algorithm, for the embedded one."""


def shipped(kind: str | None = None) -> dict[str, Path]:
    """Every recipe, or those of a kind, by name."""
    folder = Path(str(resources.files("torchspec"))) / "assets" / "recipes"
    kinds = KINDS if kind is None else (kind,)
    return {file.stem: file for each in kinds for file in sorted((folder / each).glob("*.yaml"))}


def title(recipe: Path) -> str:
    """What the recipe says it is: its first line."""
    with recipe.open(encoding="utf-8") as text:
        return text.readline().removeprefix("#").strip()


def find(file: Path) -> Path:
    """A file of this name, or the recipe that ships under it.

    Raises ConfigError with the names there are where it is neither and looks like a name.
    """
    known = shipped()
    if file.exists() or file.name != str(file) or file.suffix in (".yaml", ".yml"):
        return file
    if str(file) in known:
        return known[str(file)]
    raise ConfigError([unknown("--config", str(file), "neither a file nor a recipe that ships")])


def unknown(field: str, name: str, message: str) -> Problem:
    """That there is no recipe of this name, with those there are."""
    known = shipped()
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "`torchspec recipes` says what each is for"
    return Problem(field=field, value=name, message=message, choices=tuple(known), remedy=remedy)
