"""The training step over lengths and supervision; the figures and the plot in benchmarks/results.

python benchmarks/step_sweep.py --json benchmarks/results/step.json --plot benchmarks/results/step.png
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from harness import machine, write
from matplotlib.figure import Figure
from problem import Problem
from step import agree, arguments, measure, show

TOKENS, SUPERVISED = (512, 2048, 8192), (1.0, 0.1)
LONG, LONG_ROUNDS, PARTS_AT = 8192, 2, 2048
COLOURS = {"product": "#2f6feb", "checkpointed": "#d1592b", "eager": "#7a7a7a", "floor": "#2da36c"}


def sweep(rounds: int, threads: int, path: Path | None) -> dict[str, Any]:
    """Every problem; written after each one, since the long ones take minutes."""
    command = shlex.join(["python", "benchmarks/step_sweep.py", *sys.argv[1:]])
    body: dict[str, Any] = {"command": command, "machine": machine(), "runs": []}
    agree(Problem(tokens=512))
    for supervised in SUPERVISED:
        for tokens in TOKENS:
            print(f"\n{tokens} tokens, {supervised:.0%} supervised", flush=True)
            parts = tokens == PARTS_AT and supervised == 1.0
            turns = min(rounds, LONG_ROUNDS) if tokens >= LONG else rounds
            run = measure(Problem(tokens=tokens, supervised=supervised), rounds=turns, threads=threads, parts=parts)
            show(run)
            body["runs"].append(run)
            write(path, body)
    return body


def plot(body: dict[str, Any], path: Path) -> None:
    """Left: seconds over the floor's. Right: peak memory. Dense lines are solid, 10 % supervision is dashed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for supervised, style in ((1.0, "-"), (0.1, "--")):
        runs = [run for run in body["runs"] if run["settings"]["supervised"] == supervised]
        dense = supervised == 1.0
        for name in ("eager", "checkpointed", "product") if dense else ("checkpointed", "product"):
            rows = [(run["settings"]["tokens"], run if name == "product" else run.get(name)) for run in runs]
            rows = [(tokens, row) for tokens, row in rows if row]
            label = {"product": "step", "checkpointed": "step, recomputed", "eager": "eager reference"}[name]
            label = label if dense else f"{label}, 10 % supervised"
            tokens = [count for count, _ in rows]
            options = {"color": COLOURS[name], "linestyle": style, "marker": "o", "markersize": 4, "label": label}
            memory_axes.plot(tokens, [row["peak_mb_over_base"] for _, row in rows], **options)
            if dense:
                time_axes.plot(tokens, [row["over_floor"] for _, row in rows], **options)
    time_axes.axhline(1.0, color=COLOURS["floor"], linewidth=1, label="floor")
    time_axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="CPU time over the floor's, dense")
    memory_axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory over base (MB)")
    for axes in (time_axes, memory_axes):
        axes.set_xticks(TOKENS, [str(count) for count in TOKENS], minor=False)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.spines[["top", "right"]].set_visible(False)
    time_axes.legend(frameon=False, fontsize=7)
    memory_axes.legend(frameon=False, fontsize=7, loc="lower right", handlelength=3)
    memory_axes.set_ylim(bottom=1)
    ticks = (1, 1.1, 1.25, 1.5, 2, 3, 4)
    time_axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    time_axes.tick_params(axis="y", which="minor", left=False, labelleft=False)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--plot", type=Path, help="draw the figures here")
    parser.add_argument("--from-json", type=Path, help="measure nothing: plot these figures")
    args = parser.parse_args()
    body = json.loads(args.from_json.read_text()) if args.from_json else sweep(args.rounds, args.threads, args.json)
    if args.plot:
        plot(body, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
