"""Which trackers follow a run, and as what: OUTPUT/trackers.json holds the run's own id, so that they go on with it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchspec.core import registry
from torchspec.core.config.environment import tracker_problems
from torchspec.core.config.schema import RunConfig
from torchspec.core.config.secrets import blanked
from torchspec.core.config.sources import from_mapping
from torchspec.core.errors import CheckpointError, Problem
from torchspec.core.interfaces.tracker import TrackedRun
from torchspec.core.pipeline import run_dir
from torchspec.core.training.checkpoint_files import read_json, write_json
from torchspec.core.training.tracking import Tracking, scalars

TRACKERS = "trackers.json"


@contextmanager
def tracked(
    run: run_dir.RunDirectory | None, config: RunConfig, environment: Mapping[str, Any], step: int
) -> Iterator[Tracking | None]:
    """The run's trackers for a session that goes on from `step`; None where there are none, and on ranks without the
    run directory."""
    if run is None or not config.train.trackers:
        yield None
        return
    plain = from_mapping(blanked(config.model_dump(mode="json")), "")
    told = TrackedRun(
        id=_remembered(run.path, config),
        name=run.path.resolve().name,
        project=config.train.project,
        step=step,
        directory=run.path,
        config={setting.path: setting.value for setting in plain},
        environment=environment,
    )
    tracking = Tracking([registry.trackers().spec(name) for name in config.train.trackers], told)
    try:
        yield tracking
    finally:
        tracking.close()


def _remembered(path: Path, config: RunConfig) -> str:
    """The id of the run, a new one if it has none; and by whom it is followed, for what comes after it."""
    try:
        known = str(read_json(path / TRACKERS)["id"])
    except (CheckpointError, KeyError):
        known = secrets.token_hex(8)
    write_json(path / TRACKERS, {"id": known, "trackers": list(config.train.trackers), "project": config.train.project})
    return known


def followed_run(draft: Path) -> Path | None:
    """The run with trackers that a draft belongs to: the directory itself, or one that it is in."""
    place = draft.resolve()
    return next((each for each in (place, *place.parents) if (each / TRACKERS).is_file()), None)


def evaluation_problems(field: str, draft: Path) -> list[Problem]:
    """Why an evaluation of this draft cannot go to trackers."""
    run = followed_run(draft)
    if run is None:
        message, remedy = f"{draft} is in no run with train.trackers", "leave it out, or name RUN/draft of such a run"
        return [Problem(field=field, message=message, remedy=remedy)]
    try:
        known = read_json(run / TRACKERS)
        names = [str(name) for name in known["trackers"]]
        str(known["id"])
    except (CheckpointError, KeyError, TypeError) as error:
        return [Problem(field=field, message=f"{run / TRACKERS} cannot be used: {error}", remedy="leave it out")]
    return [replace(problem, field=field) for problem in tracker_problems({"trackers": names})]


def track_evaluation(run: Path, figures: Mapping[str, Any]) -> None:
    """Give an evaluation of its draft (eval.json) to the trackers of a run that has ended, and wait for them a while.
    What goes wrong is said and stops nothing."""
    known = read_json(run / TRACKERS)
    told = TrackedRun(
        id=str(known["id"]),
        name=run.resolve().name,
        project=known.get("project"),
        step=_last_step(run),
        directory=run,
        config={},
        environment={},
    )
    tracking = Tracking([registry.trackers().spec(name) for name in known["trackers"]], told)
    flat = scalars({**figures, "kind": "eval"})
    if figures.get("lossless") is not None:
        flat["eval/lossless"] = float(bool(figures["lossless"]))
    tracking.results(flat)
    tracking.close()


def _last_step(run: Path) -> int:
    from torchspec.core.report.record import read_run

    rows = read_run(run).train
    return int(rows[-1]["step"]) if rows else 0
