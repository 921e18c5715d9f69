"""What follows a run's figures elsewhere: TensorBoard, a server of experiments, anything of a distribution's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torchspec.core.interfaces.device import API_VERSION, Availability

Result = float | str | bool


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run, as a tracker is told of it.

    id           the run's own, the same in every session of it: a tracker that has it goes on with what it has
    name         for people: the output directory's
    project      what to file it under, if `train.project` says so; None: as the tracker's package has it
    step         where this session begins; steps after it that an earlier session told of come again
    directory    the run directory; a tracker's files belong into a folder of its own name there
    config       the resolved settings by dotted path, values plain, those of secrets blanked
    environment  versions, device, ranks
    """

    id: str
    name: str
    project: str | None
    step: int
    directory: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]


class Tracker(Protocol):
    """Called from one thread, which is not the trainer's: it may take its time, and what it raises stops nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step by name, `train/loss` and the like. A step may come more than once, and out of order."""
        ...

    def results(self, values: Mapping[str, Result]) -> None:
        """What the run, or an evaluation of its draft, came to; later values replace earlier ones of the same name."""
        ...

    def close(self) -> None:
        """Nothing more comes in this session."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrackerSpec:
    """Light description found through the entry-point group `torchspec.trackers`.

    `probe`: whether it can be used here, its package and its credentials; asks no server.
    `open`: in the tracker's own thread; begins the run there, or goes on with it.
    """

    name: str
    probe: Callable[[], Availability]
    open: Callable[[TrackedRun], Tracker]
    api_version: int = API_VERSION
