"""Does the documentation hold? Relative links and anchors exist, every page of docs/ can be reached from the README,
and blocks hold as far as that can be seen without running them (doc_blocks.py; tests/docs runs them)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from torchspec.cli.reference import SETTINGS, render, render_settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "ci"))  # which `python -P` leaves out
import doc_blocks  # noqa: E402

SKIPPED = {".venv", ".tox", ".tree", ".engines", "build", "dist", "node_modules"}

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


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


def main() -> int:
    problems = unreachable()
    for page in pages():
        problems += broken_links(page)
    for page in doc_blocks.pages():
        problems += doc_blocks.wrong(page)
    for name, page_of in (("cli.md", render), (SETTINGS, render_settings)):
        if (ROOT / "docs" / name).read_text() != page_of():
            problems.append(f"docs/{name} is not current: python -m torchspec.cli.reference docs/cli.md")
    print("\n".join(problems) or f"{len(pages())} pages hold")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
