"""What a draft that goes on from another one takes over beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def with_own_config(given: Any) -> Any:
    """A `draft` section whose `config`, where none is given, is that of the draft or the run in `init_from`.

    So its geometry is the draft's and not the target's, and as a file that an option names it travels with checkpoints.
    """
    if not isinstance(given, Mapping) or given.get("config") is not None or not given.get("init_from"):
        return given
    own = config_of(Path(str(given["init_from"])))
    return {**given, "config": own} if own.is_file() else given


def config_of(start: Path) -> Path:
    """Where the sizes of an exported draft are, or of the draft of a finished run."""
    of_run = start / "draft" / "config.json"
    return of_run if of_run.is_file() else start / "config.json"
