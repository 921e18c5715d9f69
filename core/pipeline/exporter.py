"""A run's figures for Prometheus, through Ray: each node of a cluster exports what its actors set."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchspec.core.report.pipeline import waited

EVERY_SECONDS = 2.0
PREFIX = "torchspec_"


class Exporter:
    """Follows a metrics.jsonl that another process writes, until it is closed. In a process of Ray."""

    def __init__(self, metrics: Path, run: str) -> None:
        self._metrics, self._run = metrics, run
        self._gauges: dict[str, Any] = {}
        self._closing = threading.Event()
        threading.Thread(target=self._follow, name="exporter", daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def _follow(self) -> None:
        place = 0
        while not self._closing.wait(EVERY_SECONDS):
            with suppress(OSError):
                if self._metrics.stat().st_size < place:
                    place = 0  # a resumed run has cut it
                with self._metrics.open("rb") as file:
                    file.seek(place)
                    data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                place += len(whole)
                for line in whole.splitlines():
                    self._set(json.loads(line))

    def _set(self, row: Mapping[str, Any]) -> None:
        from ray.util.metrics import Gauge

        for name, value in figures(row):
            if name not in self._gauges:
                self._gauges[name] = Gauge(PREFIX + name, description=f"of metrics.jsonl: {name}", tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._run})


def figures(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row, under names that Prometheus takes; those within it by their path, lists by their sum."""
    kind = row.get("kind")
    for name, value in row.items():
        if name != "kind":
            yield from _numbers(name if kind == "train" else f"{kind}_{name}", value)
    if row.get("step_seconds"):
        yield "waiting_fraction", waited(row) / float(row["step_seconds"])


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, Mapping) and name != "quarantined":
        for inner, each in value.items():
            yield from _numbers(f"{name}_{inner}", each)
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        for inner in value[0]:
            numbers = [each[inner] for each in value if isinstance(each.get(inner), int | float)]
            yield f"{name}_{inner}", float(sum(numbers))
