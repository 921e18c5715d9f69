"""comparison.html: several runs on one page, what sets them apart, and whether their figures may be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchspec.core.config.sources import from_mapping
from torchspec.core.report import charts
from torchspec.core.report.charts import Chart, Points
from torchspec.core.report.curves import STEP, acceptance_per_position, over_both, series, sweep
from torchspec.core.report.page import render, write_page
from torchspec.core.report.record import METRICS, RunRecord, read_run
from torchspec.core.report.standing import Standing, standing
from torchspec.core.report.values import Row, mapping, number, real

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
        notes=[f"{name}: {note}" for name, run in runs.items() for note in run.notes],
        figures=[(name, [_with_change(*pair) for pair in pairs]) for name, pairs in figures(runs)],
        charts=charts_of(runs),
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
    found = [f"{name} is not a finished run. {how.told}" for name, how in _standings(runs).items() if not how.whole]
    asked: dict[str, Callable[[RunRecord], Any]] = {
        "targets": lambda run: mapping(run.config.get("target")).get("path"),
        "training data": lambda run: run.data.get("fingerprint"),
        "validation data": lambda run: mapping(run.config.get("data")).get("validation"),
    }
    for what, ask in asked.items():
        if _differ(ask(run) for run in runs.values()):
            found.append(f"The {what} differ.")
    objective = next((what for what, ask in _OBJECTIVES.items() if _differ(ask(run) for run in runs.values())), None)
    if objective:
        found.append(f"The {objective} differ: losses are other quantities then, and only what is decoded compares.")
    for name in CONDITIONS:
        values = [run.evaluation.get(name) for run in runs.values() if run.evaluation]
        if _differ(values):
            found.append(f"The evaluations differ in {name}: {', '.join(number(value) for value in values)}.")
    machines = [mapping(run.evaluation["machine"]) for run in runs.values() if run.evaluation.get("machine")]
    if any(_differ(machine.get(name) for machine in machines) for name in ("device_name", "threads")):
        found.append("The evaluations ran on different machines: speeds do not compare.")
    unmeasured = [name for name, run in runs.items() if not run.evaluation]
    if unmeasured:
        found.append(f"Without an evaluation (eval.json): {', '.join(unmeasured)}.")
    return found


_OBJECTIVES: dict[str, Callable[[RunRecord], Any]] = {
    "algorithms": lambda run: run.config.get("algorithm"),
    "objectives": lambda run: mapping(run.config.get("draft")).get("objective"),
}


def _standings(runs: Mapping[str, RunRecord]) -> dict[str, Standing]:
    return {name: standing(run) for name, run in runs.items()}


def _differ(values: Iterable[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1


def figures(runs: Mapping[str, RunRecord]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(figure, for each run its value and its difference to the first run's); those that some run has."""
    found = []
    for name, ask in _FIGURES.items():
        values = [real(ask(run)) for run in runs.values()]
        if any(value is not None for value in values):
            found.append(
                (name, [(_shown(value), _change(values[0], value, place)) for place, value in enumerate(values)])
            )
    lossless = [run.evaluation.get("lossless") for run in runs.values()]
    if any(isinstance(value, bool) for value in lossless):
        found.append(("lossless", [(number(value) if isinstance(value, bool) else "", "") for value in lossless]))
    ends = [how.kind for how in _standings(runs).values()]
    if any(kind != "unknown" for kind in ends):
        found.append(("state", [("" if kind == "unknown" else kind, "") for kind in ends]))
    return found


def _with_change(value: str, change: str) -> str:
    return f"{value} ({change})" if change else value


def _last(rows: Sequence[Row], key: str) -> Any:
    return rows[-1].get(key) if rows else None


def _validations(run: RunRecord) -> Sequence[Row]:
    """Those in the training, else those beside it."""
    return run.validation or run.served


def _peak(run: RunRecord) -> float | None:
    return None if run.totals.peak is None else run.totals.peak / 2**20


def _minutes(run: RunRecord) -> float | None:
    return run.totals.seconds / 60 if run.totals.rows else None


_FIGURES: dict[str, Callable[[RunRecord], Any]] = {
    "acceptance length": lambda run: run.evaluation.get("acceptance_length"),
    "speed-up": lambda run: run.evaluation.get("speedup"),
    "tokens/s with draft": lambda run: run.evaluation.get("tokens_per_second"),
    "acceptance length, last validation": lambda run: _last(_validations(run), "acceptance_length"),
    "last loss": lambda run: _last(run.train, "loss"),
    "steps": lambda run: _last(run.train, "step"),
    "tokens trained": lambda run: _last(run.train, "tokens"),
    "minutes of training": _minutes,
    "peak memory, MiB": _peak,
}


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)


def _change(first: float | None, value: float | None, place: int) -> str:
    if place == 0 or first is None or value is None or first == 0:
        return ""
    return f"{value / first - 1:+.1%}"


def differing_settings(runs: Mapping[str, RunRecord]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of those that are not the same; the output directory aside, and a setting that
    is unset in one run and unknown to another's algorithm."""
    flat = [{each.path: each.value for each in from_mapping(run.config, "")} for run in runs.values()]
    paths = dict.fromkeys(path for values in flat for path in values if path != "output")
    return [
        (path, [number(values[path]) if path in values else "" for values in flat])
        for path in paths
        if _differ(values.get(path) for values in flat)
    ]


def charts_of(runs: Mapping[str, RunRecord]) -> list[Chart]:
    """Curves over each other, of what some run has."""
    drawn = []
    of_training: list[tuple[str, str, Callable[[RunRecord], Points]]] = [
        ("Loss", "nats", lambda run: series(run.train, "loss")),
        (
            "Simulated acceptance length",
            "tokens per round",
            lambda run: series(run.train, "simulated_acceptance_length"),
        ),
        (
            "Acceptance length in validations",
            "tokens per round",
            lambda run: series(_validations(run), "acceptance_length"),
        ),
        ("Throughput", "tokens/s", lambda run: series(run.train, "tokens_per_second")),
    ]
    for title, y, ask in of_training:
        over: dict[str, dict[str, Points]] = {}
        for name, run in runs.items():
            for axis, lines in over_both(run, {name: ask(run)} if ask(run) else {}).items():
                over.setdefault(axis, {}).update(lines)
        if whole := {axis: lines for axis, lines in over.items() if lines and lines.keys() == over[STEP].keys()}:
            drawn.append(charts.lines(title, whole, y=y, smooth=True, source=f"each run's {METRICS}", named=True))
    of_evaluation: list[tuple[str, str, str, Callable[[RunRecord], Points]]] = [
        (
            "Acceptance per position",
            "drafted position",
            "accepted",
            lambda run: acceptance_per_position(run.evaluation),
        ),
        ("Speed-up by draft length", "draft length", "", lambda run: sweep(run.evaluation, "speedup")),
        (
            "Acceptance length by draft length",
            "draft length",
            "tokens per round",
            lambda run: sweep(run.evaluation, "acceptance_length"),
        ),
    ]
    for title, x, y, ask in of_evaluation:
        lines = {name: points for name, run in runs.items() if (points := ask(run))}
        if lines:
            drawn.append(charts.lines(title, {x: lines}, y=y, named=True))
    return drawn
