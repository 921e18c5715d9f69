"""Why there is no record: a small file where the record would be, from processes that have no other way to say it."""

from __future__ import annotations

from pathlib import Path

from torchspec.core.features.directory import DirectoryStore

MOST_CHARACTERS = 2000


def report_failure(store: DirectoryStore, record_id: str, reason: str) -> None:
    path = _path(store, record_id)
    aside = path.with_name(path.name + ".new")
    aside.write_text(reason[:MOST_CHARACTERS], encoding="utf-8")
    aside.replace(path)


def failure_of(store: DirectoryStore, record_id: str) -> str | None:
    """The reason, which is then forgotten; None as long as there is none."""
    path = _path(store, record_id)
    try:
        reason = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    path.unlink(missing_ok=True)
    return reason


def _path(store: DirectoryStore, record_id: str) -> Path:
    return store.root / f"{record_id}.failed"
