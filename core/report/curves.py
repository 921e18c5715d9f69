"""The charts of a run: which there are, and from which of its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from torchspec.core.report import charts, pipeline
from torchspec.core.report.charts import Chart, Points
from torchspec.core.report.record import METRICS, RunRecord
from torchspec.core.report.values import Row, listed, mapping, real

STEP, TOKENS = "step", "tokens trained"
Line = list[tuple[float, float]]


def series(rows: Sequence[Row], key: str) -> Line:
    """(step, value) of the rows that have it."""
    found = [(float(row["step"]), real(row.get(key))) for row in rows]
    return [(step, value) for step, value in found if value is not None]


def over_both(record: RunRecord, lines: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """The same lines over steps and, where the run counted them, over tokens trained by then."""
    known = sorted(series(record.train, "tokens"))
    over: dict[str, dict[str, Points]] = {STEP: dict(lines)}
    if known:
        steps, tokens = zip(*known, strict=True)
        over[TOKENS] = {
            name: [(float(np.interp(step, steps, tokens)), value) for step, value in points]
            for name, points in lines.items()
        }
    return over


def of_run(record: RunRecord) -> list[Chart]:
    """Those that the run has figures for."""
    return [*_of_evaluation(record.evaluation), *_of_training(record)]


def acceptance_per_position(evaluation: Row) -> Line:
    """(position from 1, share of rounds) as far as it was measured."""
    rates = enumerate(map(real, listed(evaluation.get("acceptance_per_position"))), start=1)
    return [(float(place), rate) for place, rate in rates if rate is not None]


def sweep(evaluation: Row, figure: str) -> Line:
    """(draft length, figure) of the draft lengths that were measured."""
    rows = [mapping(row) for row in listed(evaluation.get("sweep"))]
    found = [(real(row.get("draft_length")), real(row.get(figure))) for row in rows]
    return [(length, value) for length, value in found if length is not None and value is not None]


def _of_evaluation(result: Row) -> list[Chart]:
    drawn = []
    rates = acceptance_per_position(result)
    if rates:
        note = "Share of drafting rounds in which at least this many drafted tokens were accepted (unconditional)."
        by_place = {f"{place:.0f}": rate for place, rate in rates}
        title = "Acceptance per position"
        drawn.append(charts.bars(title, by_place, x="drafted position", y="accepted", note=note, top=1.0))
    lengths = {"speed-up": sweep(result, "speedup"), "acceptance length": sweep(result, "acceptance_length")}
    present = {name: points for name, points in lengths.items() if points}
    if present:
        note = "Decoded with each draft length. Below a speed-up of 1 decoding is faster without the draft."
        drawn.append(charts.lines("Which draft length pays", {"draft length": present}, y="", note=note))
    return drawn


def _of_training(record: RunRecord) -> list[Chart]:
    train, drawn = record.train, list[Chart]()
    thin = f" One step in {record.stride:,} is drawn." if record.stride > 1 else ""

    def add(title: str, note: str, lines: Mapping[str, Points], y: str, *, smooth: bool = True) -> None:
        present = {name: points for name, points in lines.items() if points}
        if present:
            over = over_both(record, present)
            drawn.append(charts.lines(title, over, y=y, note=note + thin, smooth=smooth, source=METRICS))

    add(
        "Loss",
        "Cross-entropy against the target's distribution; KL is what it is above that distribution's own entropy.",
        {"loss": series(train, "loss"), "KL": series(train, "kl")},
        "nats",
    )
    add(
        "Acceptance length",
        "Simulated: the walk decoding would take over the training text, where every position of it was drafted; the "
        "mean over positions is above it, since decoding lingers where drafting is hard. Decoded: real speculative "
        "decoding of validation prompts, by torchspec itself or in a serving engine.",
        _acceptance(record),
        "tokens per round",
    )
    add(
        "Accuracy per position",
        "Draft and target agree on the next token.",
        _positions(train, "accuracy_per_position"),
        "share of tokens",
    )
    add("Learning rate", "", {"learning rate": series(train, "lr")}, "", smooth=False)
    add("Gradient norm", "Before clipping.", {"gradient norm": series(train, "grad_norm")}, "")
    add("Throughput", "", {"tokens/s": series(train, "tokens_per_second")}, "tokens/s")
    add(
        "Pipeline",
        pipeline.verdict(train),
        {"trainer waits": pipeline.waiting(train), "engines work": pipeline.working(train)},
        "share of the time",
    )
    memory = [{**mapping(row.get("memory")), "step": row["step"]} for row in train]
    whole = max((total for _, total in series(memory, "total")), default=0.0)
    note = "The most in use during a step, of the rank that needs most."
    note += f" It has {whole / 2**20:,.0f} MiB." if whole else ""
    add(
        "Memory", note, {"peak": [(step, value / 2**20) for step, value in series(memory, "peak")]}, "MiB", smooth=False
    )
    where, all_seconds = record.totals.time, sum(record.totals.time.values())
    if all_seconds:
        shares = {name: seconds / all_seconds for name, seconds in where.items()}
        note = "Mean over all steps."
        drawn.append(charts.bars("Where the time went", shares, x="phase", y="share of step time", note=note, top=1.0))
    return drawn


def _acceptance(record: RunRecord) -> dict[str, Points]:
    written = [{**mapping(row.get("on_policy")), "step": row["step"]} for row in record.train]
    return {
        "simulated": series(record.train, "simulated_acceptance_length"),
        "mean over trained positions": series(record.train, "joint_prefix_length"),
        "decoded": series(record.validation, "acceptance_length"),
        "decoded while the text was written": series(written, "acceptance_length"),
        **{
            f"in {name}" if name else "decoded beside the training": series(rows, "acceptance_length")
            for name, rows in _by_engine(record.served).items()
        },
    }


def _by_engine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Measurements made beside the training; those of our own decoder name no engine."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.get("engine") or ""), []).append(row)
    return dict(sorted(found.items()))


def _positions(rows: Sequence[Row], key: str) -> dict[str, Points]:
    """A line for each entry of a list that rows have."""
    found: dict[str, Line] = {}
    for row in rows:
        for place, value in enumerate(listed(row.get(key))[: 4 * charts.MOST_LINES], start=1):
            share = real(value)
            if share is not None:
                found.setdefault(f"position {place}", []).append((float(row["step"]), share))
    return dict(found)
