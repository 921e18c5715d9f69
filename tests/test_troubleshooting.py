"""The messages that docs/troubleshooting.md quotes are those that the source has."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUOTED = (
    "tokens per round where",
    "our decoder accepts",
    "the exported draft does not predict what the trained one does",
    "the parameters were not updated.",
    "Look at these samples, or lower train.lr or train.clip_norm, and start",
    ", often for want of memory",
    "the newest checkpoint counts: the same command continues from it",
    "raise engine.store_mb, or ask for fewer or shorter samples at a time",
    "cannot start: ",
    "ended while it started",
    "(engine.start_timeout)",
    "the token is missing or not this worker's",
    "this worker speaks protocol",
    "it is not started again",
    "waiting for room on the cluster",
    "belongs to another run and cannot be resumed with this configuration:",
    "data order and weights continue exactly, random states are drawn anew",
    "another process is training in",
    "no checkpoint in ",
    "reached at ",
    "no Mooncake master answers at",
    "Mooncake is not available",
    "no such setting (",
    "did you mean",
)


@pytest.fixture(scope="module")
def texts() -> str:
    """Every text of the source, whole where it is written in parts."""
    found = []
    for room in ("core", "backends", "src"):
        for file in (ROOT / room).rglob("*.py"):
            nodes = ast.walk(ast.parse(file.read_text()))
            found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(found)


@pytest.mark.parametrize("words", QUOTED)
def test_messages_are_quoted_as_they_are(words: str, texts: str) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text().replace("\n> ", " ")
    assert words.strip() in " ".join(page.split())
    assert words in texts
