"""Running a training from the command line: progress with figures, the exit code of a stopped run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchspec.cli.console import ProgressDisplay, announce
from torchspec.core.config.schema import RunConfig
from torchspec.core.report.pipeline import waited

if TYPE_CHECKING:
    from torchspec.core.pipeline.inprocess import RunOutcome

_TAIL_BYTES = 1 << 14


def train(config: RunConfig, provenance: Mapping[str, str], *, silent: bool = False) -> int:
    """Train in this process; -> 0, or 128 + the signal that stopped the run."""
    from torchspec.core.pipeline.inprocess import train as run

    metrics = config.output / "metrics.jsonl"
    with ProgressDisplay(silent=silent, figures=lambda: latest_figures(metrics)) as progress:
        outcome = run(config, provenance=provenance, progress=progress)
    if not silent:
        _say_how_it_ended(outcome)
    return outcome.exit_code


def _say_how_it_ended(outcome: RunOutcome) -> None:
    if outcome.signal:
        announce(f"stopped at step {outcome.step} of {outcome.total_steps}; the same command continues the run")
        return
    length = outcome.acceptance_length
    decoded = "" if length is None else f", best decoded acceptance length {length:.2f}"
    announce(f"trained {outcome.step} steps{decoded}; draft in {outcome.draft}, report in {outcome.report}")


def latest_figures(metrics: Path) -> str:
    """Loss, simulated acceptance length and speed of the newest step in metrics.jsonl; empty if there is none."""
    try:
        with metrics.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # being written, or cut by the start of the tail
        if isinstance(row, dict) and row.get("kind") == "train" and row.get("loss") is not None:
            accepted = _accepted(row)
            return (
                f"loss {row['loss']:.3f}, {accepted}{row['tokens_per_second']:.0f} tokens/s{_written(row)}{_flow(row)}"
            )
    return ""


def _accepted(row: dict[str, Any]) -> str:
    """Both lengths are null where no text was long enough for a round, the first where only some positions of each text
    were drafted."""
    walk, mean = row.get("simulated_acceptance_length"), row.get("joint_prefix_length")
    if walk is not None:
        return f"simulated acceptance {walk:.2f}, "
    return "" if mean is None else f"mean prefix {mean:.2f}, "


def _written(row: dict[str, Any]) -> str:
    """On-policy: what a round brought while the step's text was written with the draft."""
    length = row.get("on_policy", {}).get("acceptance_length")
    return "" if length is None else f"; written with {length:.2f} tokens a round"


def _flow(row: dict[str, Any]) -> str:
    """Of a pipeline: what the trainer waited, what is held for it, what the engines do."""
    flow = row.get("pipeline")
    if not flow:
        return ""
    share, held = waited(row) / row["step_seconds"], flow["held_bytes"] / 1e6
    text = f"; waited {share:.0%}, {flow['turns_ahead']} passes ahead in {held:.0f} MB"
    engines = flow.get("engines") or []
    if engines:
        speed = sum(engine["tokens_per_second"] * engine["busy"] for engine in engines)
        busy = sum(engine["busy"] for engine in engines) / len(engines)
        stored = sum(engine["nbytes"] for engine in engines) / 1e6
        text += f"; engines {speed:.0f} tokens/s, {busy:.0%} busy, {stored:.0f} MB in their stores"
    return text
