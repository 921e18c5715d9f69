"""The documentation's site: what is public is in the API reference, and every page has its place in the navigation."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = (
    "torchspec",
    "torchspec.core.objectives",
    "torchspec.devices.api",
    "torchspec.devices.parts",
    "torchspec.backends.api",
)


class _Loader(yaml.SafeLoader):
    """Of mkdocs.yml, whose tags name Python functions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def navigation() -> list[str]:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inside = entry.values() if isinstance(entry, dict) else entry
        return [page for part in inside for page in pages(part)]  # type: ignore[attr-defined]

    return pages(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"])


@pytest.mark.parametrize("module", PUBLIC)
def test_what_is_public_is_in_the_reference(module: str) -> None:
    named = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    public = importlib.import_module(module)
    for name in public.__all__:
        thing = getattr(public, name)
        home = getattr(thing, "__module__", "")
        if not home.startswith("torchspec."):
            continue  # a constant, documented with what it is of
        shown = {home, f"{home}.{name}", f"{module}.{name}"} & named
        assert shown, f"docs/api.md does not show {module}.{name}"


def test_every_page_has_one_place_in_the_navigation() -> None:
    listed = navigation()
    assert len(listed) == len(set(listed))
    assert [page for page in listed if not (ROOT / page).is_file()] == []
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert pages - set(listed) == set()


def test_the_site_asks_nobody_for_anything() -> None:
    """No font, script or image of another host."""
    text = (ROOT / "mkdocs.yml").read_text()
    assert yaml.load(text, _Loader)["theme"]["font"] is False
    assert "http" not in text
    for page in navigation():
        assert re.findall(r"!\[[^\]]*\]\(https?:", (ROOT / page).read_text()) == [], page
