"""MLflow: the store that MLFLOW_TRACKING_URI names, else MLflow's own default."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torchspec.core import settings
from torchspec.core.interfaces.tracker import Result, TrackedRun, TrackerSpec
from torchspec.core.trackers.packages import PROJECT, installed

OURS = "torchspec.run"
"""The tag by which a session finds the run that an earlier one began: MLflow's ids are its own."""
LONGEST = 500
AT_ONCE = 100


class MLflow:
    """Settings are parameters, which MLflow never changes: what a later session has otherwise becomes a tag."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = run.project or settings.value_of("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        known = self._client.search_runs([place], filter_string=f"tags.`{OURS}` = '{run.id}'", max_results=1)
        if known:
            self._client.update_run(known[0].info.run_id, status="RUNNING")
        found = known[0] if known else self._client.create_run(place, tags={OURS: run.id}, run_name=run.name)
        self._id: str = found.info.run_id
        self._tell(found.data.params, {**run.config, **_named("environment", run.environment)})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def results(self, values: Mapping[str, Result]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._client.log_metric(self._id, f"results/{name}", float(value))
            else:
                self._client.set_tag(self._id, f"results.{name}", value)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _tell(self, known: Mapping[str, str], values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        texts = {name: str(value)[:LONGEST] for name, value in values.items()}
        fresh = [Param(name, text) for name, text in texts.items() if name not in known]
        for first in range(0, len(fresh), AT_ONCE):
            self._client.log_batch(self._id, params=fresh[first : first + AT_ONCE])
        changed = [RunTag(f"now.{name}", text) for name, text in texts.items() if known.get(name, text) != text]
        if changed:
            self._client.log_batch(self._id, tags=changed)


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


SPEC = TrackerSpec(name="mlflow", probe=lambda: installed("mlflow"), open=MLflow)
