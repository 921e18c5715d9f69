"""How a training stands, from its metrics.jsonl and checkpoints, which another process may write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchspec.core.errors import CheckpointError
from torchspec.core.report.pipeline import waited
from torchspec.core.training.checkpoint_files import best_step, directory_of, steps_on_disk

Row = dict[str, Any]

TAIL_BYTES = 1 << 18
"""Of what is there already, this much is read for the newest rows."""
BETWEEN_LOOKS = 2.0
"""Seconds, at the checkpoints."""


class RunFigures:
    """Follows a run; `epochs` are those it will have."""

    def __init__(self, metrics: Path, checkpoints: Path | None = None, *, epochs: int = 1) -> None:
        self._metrics, self._checkpoints, self._epochs = metrics, checkpoints, epochs
        self._place: int | None = None
        self._rows: dict[str, Row] = {}
        self._looked = 0.0
        self._kept: list[str] = []

    @property
    def step(self) -> int:
        """The newest one, 0 before the first."""
        self._read()
        return int(self._rows.get("train", {}).get("step", 0))

    def line(self) -> str:
        """For a log: loss, acceptance, speed and what a pipeline waits; "" before the first step."""
        self._read()
        row = self._rows.get("train")
        if row is None or row.get("loss") is None:
            return ""
        speed = f"{row['tokens_per_second']:.0f} tokens/s"
        parts = [f"loss {row['loss']:.3f}", *_simulated(row), speed]
        return ", ".join(parts) + _written(row) + "".join(f"; {part}" for part in _flow(row))

    def sections(self) -> list[list[str]]:
        """For a screen: fields that belong together."""
        self._read()
        row = self._rows.get("train")
        found: list[list[str]] = []
        if row is not None and row.get("loss") is not None:
            epoch = f"epoch {row['epoch'] + 1} of {self._epochs}" if "epoch" in row else ""
            found.append([field for field in (epoch, f"loss {row['loss']:.3f}", *_rates(row)) if field])
            found.append([*_simulated(row), *_per_position("accuracy per position", row.get("accuracy_per_position"))])
            found.append([f"{row['tokens_per_second']:,.0f} tokens/s", *_sizes(row)])
            if flow := _flow(row):
                found.append(flow)
            if row.get("on_policy"):
                found.append([_written(row).removeprefix("; ")])
        for kind, what in (("validation", "decoded"), ("served", "served")):
            if kind in self._rows and "acceptance_length" in self._rows[kind]:
                found.append(_decoded(self._rows[kind], what))
        found.append(self._checkpoint())
        return [fields for fields in ([field for field in fields if field] for fields in found) if fields]

    def look_again(self) -> None:
        """At the checkpoints, with the next question."""
        self._looked = 0.0

    def _read(self) -> None:
        """The rows that came since."""
        try:
            with self._metrics.open("rb") as stream:
                size = stream.seek(0, 2)
                if self._place is None or size < self._place:  # the first look; or a resumed run has cut it
                    self._place = max(0, size - TAIL_BYTES)
                stream.seek(self._place)
                data = stream.read()
        except OSError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut by the start of the tail
            if isinstance(row, dict) and isinstance(row.get("kind"), str):
                self._rows[row["kind"]] = row

    def _checkpoint(self) -> list[str]:
        if self._checkpoints is None:
            return []
        if time.monotonic() - self._looked > BETWEEN_LOOKS or not self._looked:
            self._looked = time.monotonic()
            self._kept = _newest(self._checkpoints)
        return self._kept


def _newest(checkpoints: Path) -> list[str]:
    try:
        steps = steps_on_disk(checkpoints)
        if not steps:
            return ["no checkpoint yet"]
        age = max(0.0, time.time() - directory_of(checkpoints, steps[-1]).stat().st_mtime)
        best = best_step(checkpoints)
    except (OSError, CheckpointError):  # being written, or taken away
        return []
    ago = f"{age / 60:.0f} min ago" if age >= 60 else "just now"
    return [f"checkpoint of step {steps[-1]}, {ago}", *([f"best: step {best[0]}"] if best is not None else [])]


def _rates(row: Row) -> list[str]:
    shown: list[tuple[str, Callable[[float], str]]] = [
        ("lr", lambda value: f"lr {value:.2e}"),
        ("grad_norm", lambda value: f"gradient {value:.2f}"),
    ]
    return [show(row[name]) for name, show in shown if row.get(name) is not None]


def _simulated(row: Row) -> list[str]:
    """Both lengths are null where no text was long enough for a round, the first where only some positions of each text
    were drafted."""
    walk, mean = row.get("simulated_acceptance_length"), row.get("joint_prefix_length")
    if walk is not None:
        return [f"simulated acceptance {walk:.2f}"]
    return [] if mean is None else [f"joint prefix {mean:.2f}"]


def _per_position(name: str, rates: object) -> list[str]:
    shares = [rate for rate in rates if isinstance(rate, int | float)] if isinstance(rates, list) else []
    return [f"{name} {' '.join(f'{rate:.2f}' for rate in shares)}"] if shares else []


def _sizes(row: Row) -> list[str]:
    fields = [f"{row['step_seconds']:.2f} s a step"] if row.get("step_seconds") else []
    memory = row.get("memory") or {}
    if memory.get("peak"):
        whole = f" of {memory['total'] / 1e9:.1f}" if memory.get("total") else ""
        fields.append(f"memory {memory['peak'] / 1e9:.2f}{whole} GB")
    if row.get("empty_windows"):
        fields.append(f"{row['empty_windows']} steps without supervision")
    return fields


def _decoded(row: Row, what: str) -> list[str]:
    where = f" in {row['engine']}" if row.get("engine") else ""
    length = f"{what}{where} at step {row['step']}: acceptance length {row['acceptance_length']:.2f}"
    return [length, *_per_position("accepted per position", row.get("acceptance_per_position"))]


def _written(row: Row) -> str:
    """On-policy: what a round brought while the step's text was written with the draft."""
    length = (row.get("on_policy") or {}).get("acceptance_length")
    return "" if length is None else f"; written with {length:.2f} tokens a round"


def _flow(row: Row) -> list[str]:
    """Of a pipeline: what the trainer waited, what is held for it, what the engines do."""
    flow = row.get("pipeline")
    if not flow:
        return []
    share, held = waited(row) / row["step_seconds"], flow["held_bytes"] / 1e6
    fields = [f"waited {share:.0%}, {flow['turns_ahead']} passes ahead in {held:.0f} MB"]
    engines = flow.get("engines") or []
    if engines:
        speed = sum(engine["tokens_per_second"] * engine["busy"] for engine in engines)
        busy = sum(engine["busy"] for engine in engines) / len(engines)
        stored = sum(engine["nbytes"] for engine in engines) / 1e6
        fields.append(f"engines {speed:.0f} tokens/s, {busy:.0%} busy, {stored:.0f} MB in their stores")
    return fields
