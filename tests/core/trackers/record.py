"""Writes recorded.json: what the trackers' packages take, of an environment that has them.

    python tests/core/trackers/record.py

The adapters' tests hold every call against it, so that they need no such package.
"""

from __future__ import annotations

import inspect
import json
from importlib import import_module, metadata
from pathlib import Path

CALLED = {
    "wandb": ("init", "Settings", "Run.log", "Run.define_metric", "Run.finish"),
    "mlflow": (
        "MlflowClient.get_experiment_by_name", "MlflowClient.create_experiment", "MlflowClient.search_runs",
        "MlflowClient.create_run", "MlflowClient.update_run", "MlflowClient.log_batch", "MlflowClient.log_metric",
        "MlflowClient.set_tag", "MlflowClient.set_terminated", "entities.Metric", "entities.Param", "entities.RunTag",
    ),
    "trackio": ("init", "Run.log", "Run.finish"),
}  # fmt: skip


def parameters(module: str, path: str) -> list[str]:
    found = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    if hasattr(found, "model_fields"):
        return sorted(found.model_fields)
    return [name for name in inspect.signature(found).parameters if name != "self"]


def main() -> None:
    recorded = {
        module: {"version": metadata.version(module), **{path: parameters(module, path) for path in paths}}
        for module, paths in CALLED.items()
    }
    Path(__file__).with_name("recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
