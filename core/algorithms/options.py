"""What users say of any draft that has a geometry of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from torchspec.core.objectives.terms import ObjectiveOptions


class DraftOptions(ObjectiveOptions):
    """The `config` of a draft that goes on from another one, where none is given, is that of the draft or the run in
    `init_from`: so its geometry is the draft's and not the target's, and as a file that an option names it travels with
    checkpoints."""

    config: Path | None = Field(
        None, description="a draft config.json to take the geometry from; default: that of `init_from`"
    )
    init_from: Path | None = Field(
        None, description="draft to start from: published (docs/checkpoints.md), exported, or a checkpoint"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_start(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("config") is not None or not given.get("init_from"):
            return given
        own = config_of(Path(str(given["init_from"])))
        return {**given, "config": own} if own.is_file() else given

    @field_validator("config")
    @classmethod
    def _the_file(cls, config: Path | None) -> Path | None:
        """The file itself: checkpoints carry the files that options name, and compare them by their contents."""
        return config / "config.json" if config is not None and config.is_dir() else config


def config_of(start: Path) -> Path:
    """Where the sizes of an exported draft are, or of the draft of a finished run."""
    of_run = start / "draft" / "config.json"
    return of_run if of_run.is_file() else start / "config.json"
