"""comparison.html: several runs on one page, what sets them apart, and whether their figures may be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchspec.core.config.sources import from_mapping
from torchspec.core.report import charts
from torchspec.core.report.html import Chart, Row, RunRecord, number, read_run, render, series, write_page

CONDITIONS = (
    "prompts",
    "prompts_digest",
    "max_new_tokens",
    "temperature",
    "draft_length",
    "batch_size",
    "seed",
    "dtype",
    "engine",
)
"""Of an evaluation: figures under different ones do not compare."""


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Write `comparison.html` into the first run directory and return its path; differences are to that run.

    Raises TorchspecError when a directory is no run.
    """
    runs = dict(zip(_names(run_dirs), map(read_run, run_dirs), strict=True))
    text = render(
        "compare.html",
        names=list(runs),
        warnings=incomparable(runs),
        figures=figures(runs),
        charts=_charts(runs),
        differing=differing_settings(runs),
    )
    return write_page(run_dirs[0] / "comparison.html", text)


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Of the directories; their whole paths where two are called the same, numbered where they are the same."""
    names = [path.resolve().name for path in run_dirs]
    names = names if len(set(names)) == len(names) else [str(path.resolve()) for path in run_dirs]
    again = {name for name in names if names.count(name) > 1}
    return [f"{name} ({place})" if name in again else name for place, name in enumerate(names, start=1)]


def incomparable(runs: Mapping[str, RunRecord]) -> list[str]:
    """Why the figures of these runs do not compare; [] if nothing recorded speaks against it."""
    found = []
    asked: dict[str, Callable[[RunRecord], Any]] = {
        "targets": lambda run: (run.config.get("target") or {}).get("path"),
        "training data": lambda run: run.data.get("fingerprint"),
        "validation data": lambda run: (run.config.get("data") or {}).get("validation"),
    }
    for what, ask in asked.items():
        if _differ(ask(run) for run in runs.values()):
            found.append(f"The {what} differ.")
    for name in CONDITIONS:
        values = [run.evaluation.get(name) for run in runs.values() if run.evaluation]
        if _differ(values):
            found.append(f"The evaluations differ in {name}: {', '.join(number(value) for value in values)}.")
    machines = [run.evaluation["machine"] for run in runs.values() if isinstance(run.evaluation.get("machine"), dict)]
    if any(_differ(machine.get(name) for machine in machines) for name in ("device_name", "threads")):
        found.append("The evaluations ran on different machines: speeds do not compare.")
    unmeasured = [name for name, run in runs.items() if not run.evaluation]
    if unmeasured:
        found.append(f"Without an evaluation (eval.json): {', '.join(unmeasured)}.")
    return found


def _differ(values: Iterable[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1


def figures(runs: Mapping[str, RunRecord]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(figure, for each run its value and its difference to the first run's); those that some run has."""
    found = []
    for name, ask in _FIGURES.items():
        values = [_real(ask(run)) for run in runs.values()]
        if any(value is not None for value in values):
            found.append(
                (name, [(_shown(value), _change(values[0], value, place)) for place, value in enumerate(values)])
            )
    lossless = [run.evaluation.get("lossless") for run in runs.values()]
    if any(value is not None for value in lossless):
        found.append(("lossless", [("" if value is None else number(value), "") for value in lossless]))
    return found


def _last(rows: Sequence[Row], key: str) -> Any:
    return rows[-1].get(key) if rows else None


def _peak(run: RunRecord) -> float | None:
    values = [_real((row.get("memory") or {}).get("peak")) for row in run.train]
    return max((value / 2**20 for value in values if value is not None), default=None)


def _minutes(run: RunRecord) -> float | None:
    values = [_real(row.get("step_seconds")) for row in run.train]
    return sum(value for value in values if value is not None) / 60 if run.train else None


_FIGURES: dict[str, Callable[[RunRecord], Any]] = {
    "acceptance length": lambda run: run.evaluation.get("acceptance_length"),
    "speed-up": lambda run: run.evaluation.get("speedup"),
    "tokens/s with draft": lambda run: run.evaluation.get("tokens_per_second"),
    "acceptance length, last validation": lambda run: _last(run.validation, "acceptance_length"),
    "last loss": lambda run: _last(run.train, "loss"),
    "steps": lambda run: _last(run.train, "step"),
    "tokens trained": lambda run: _last(run.train, "tokens"),
    "minutes of training": _minutes,
    "peak memory, MiB": _peak,
}


def _real(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)


def _change(first: float | None, value: float | None, place: int) -> str:
    if place == 0 or first is None or value is None or first == 0:
        return ""
    return f"{value / first - 1:+.1%}"


def differing_settings(runs: Mapping[str, RunRecord]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of those that are not the same; the output directory aside."""
    flat = [{each.path: each.value for each in from_mapping(run.config, "")} for run in runs.values()]
    paths = dict.fromkeys(path for values in flat for path in values if path != "output")
    return [
        (path, [number(values[path]) if path in values else "" for values in flat])
        for path in paths
        if _differ(values.get(path, "") for values in flat)
    ]


def _charts(runs: Mapping[str, RunRecord]) -> list[Chart]:
    asked: list[tuple[str, str, Callable[[RunRecord], Any]]] = [
        ("Loss", "nats", lambda run: series(run.train, "loss")),
        (
            "Simulated acceptance length",
            "tokens per round",
            lambda run: series(run.train, "simulated_acceptance_length"),
        ),
        (
            "Acceptance length in validations",
            "tokens per round",
            lambda run: series(run.validation, "acceptance_length"),
        ),
        ("Throughput", "tokens/s", lambda run: series(run.train, "tokens_per_second")),
    ]
    drawn = []
    for title, unit, ask in asked:
        lines = {name.replace("$", r"\$"): ask(run) for name, run in runs.items()}
        present = {name: points for name, points in lines.items() if points}
        if present:
            drawn.append(Chart(title=title, note="", svg=charts.lines(present, x="step", y=unit, smooth=True)))
    return drawn
