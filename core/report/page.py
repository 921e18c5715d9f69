"""A page: one file without anything loaded from elsewhere, from the templates beside this file."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, select_autoescape

from torchspec.core.errors import TorchspecError


def render(template: str, **values: Any) -> str:
    """A page from a template; everything that is put into it is escaped, but for charts.py's drawings."""
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return _environment().get_template(template).render(written=written, **values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(_asset),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return resources.files("torchspec.core.report").joinpath(name).read_text(encoding="utf-8")


def write_page(path: Path, text: str) -> Path:
    """Whole or not at all; TorchspecError when it cannot be written."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(text.encode("utf-8", errors="replace"))  # half a surrogate pair, in names of files or in JSON
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise TorchspecError(f"cannot write {path}: {error.strerror}") from error
    return path
