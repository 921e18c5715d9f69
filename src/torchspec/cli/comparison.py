"""Algorithms side by side for `torchspec bench algorithms`: what a step costs each, results.json, table and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchspec.core import registry
from torchspec.core.config.schema import RunConfig
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.pipeline.draft_shapes import draft_of_shapes
from torchspec.core.pipeline.plan_flops import step_flops
from torchspec.core.report import charts

COUNTED_SAMPLES = 64


def flops_per_sample(config: RunConfig, spec: TargetSpec, samples: Sequence[TrainingSample]) -> tuple[float, int]:
    """(matrix FLOPs of one sample's forward and backward pass, attention left out; parameters trained).

    What the target itself costs is the same for all algorithms and is left out.
    """
    algorithm = registry.algorithms().spec(config.algorithm).create(config.draft, spec)
    trained = sum(p.numel() for p in draft_of_shapes(algorithm, spec).parameters() if p.requires_grad)
    return step_flops(algorithm, spec, samples, seed=config.seed).products, trained


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a recipe: FLOPs of a sample, and the steps that a budget buys."""

    flops: float
    parameters: int
    steps: int


def steps_of(flops: Mapping[str, float], reference: str, steps: int) -> dict[str, int]:
    """For each recipe as many steps as cost what `steps` of the reference cost, at least one."""
    budget = flops[reference] * steps
    return {name: max(1, round(budget / each)) for name, each in flops.items()}


def training_figures(metrics: Path) -> dict[str, Any]:
    """From a finished run's metrics.jsonl: seconds of its steps without the target's, the peak of memory, tokens."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    train = [row for row in rows if row.get("kind") == "train"]
    outside = ("capture", "data")
    seconds = sum(value for row in train for name, value in row["time"].items() if name not in outside)
    return {
        "train_seconds": seconds,
        "memory_peak_bytes": max(row["memory"]["peak"] for row in train),
        "train_tokens": train[-1]["tokens"],
        "loss_last": train[-1]["loss"],
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The table of docs/results.md."""
    head = (
        "| recipe | algorithm | acceptance length | best speed-up (draft length) | tokens/s | trained parameters | "
        "steps | training, s | peak memory, MB | lossless |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for row in sorted(results["rows"], key=lambda row: -row["acceptance_length"]):
        lines.append(
            f"| {row['recipe']} | {row['algorithm']} | {row['acceptance_length']:.2f} | {row['speedup']:.2f} "
            f"({row['best_draft_length']}) | {row['tokens_per_second']:.0f} | {row['parameters'] / 1e6:.2f} M | "
            f"{row['steps']} | {row['train_seconds']:.0f} | {row['memory_peak_bytes'] / 1e6:.0f} | "
            f"{'yes' if row['lossless'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def plots(results: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name: acceptance lengths and speed-ups, and the share of rounds that accept each position."""
    rows = sorted(results["rows"], key=lambda row: -row["acceptance_length"])
    pairs = {row["recipe"]: (row["acceptance_length"], row["speedup"]) for row in rows}
    by_place = {
        row["recipe"]: [(place + 1.0, rate) for place, rate in enumerate(row["acceptance_per_position"])]
        for row in rows
    }
    return {
        "algorithms.png": charts.pairs_png(pairs, names=("acceptance length", "best speed-up"), x=""),
        "positions.png": charts.lines_png(by_place, x="drafted position", y="share of rounds that accept it"),
    }
