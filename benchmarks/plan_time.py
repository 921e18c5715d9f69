"""What the plan says of a run's time against what its steps take, on the embedded target.

A recipe is trained twice from the same start, for a few steps and for more, in a process of its own with one thread;
the difference of the processor seconds of both is what the steps between took. The plan is asked for the same steps.
Processor seconds, because the machine may have other work; how fast products are is the fastest of many, which other
work does not change either.

    torchspec prepare --output data; head -400 data/train.jsonl > few.jsonl
    python benchmarks/plan_time.py --data few.jsonl --json benchmarks/results/plan_time.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from torchspec.core import settings
from torchspec.core.config.load import load_config
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.plan import make_plan
from torchspec.core.pipeline.plan_time import Range


def words(recipe: str, data: Path, output: Path, steps: int) -> list[str]:
    """The command, whose batches do not depend on how long it runs."""
    return [
        "train", "--config", recipe, "--target", "embedded", "--data", str(data), "--output", str(output),
        "--device", "cpu", f"train.max_steps={steps}", "train.epochs=100", "eval.every=0",
    ]  # fmt: skip


def processor_seconds(command: list[str]) -> float:
    """Of a process and those that it starts, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-P", "-m", "torchspec", *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def planned(recipe: str, data: Path, output: Path, steps: int) -> dict[str, Any]:
    """The plan's time of so many steps, as JSON."""
    values = {"target": {"path": "embedded"}, "data": {"train": [data]}, "output": output, "device": "cpu"}
    overrides = [f"train.max_steps={steps}", "train.epochs=100", "eval.every=0"]
    config, sources = load_config(file=Path(recipe), values=values, overrides=overrides)
    found: dict[str, Any] = make_plan(config, sources, Ranks()).time.to_json()
    return found


def measure(recipe: str, data: Path, few: int, many: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        taken = [processor_seconds(words(recipe, data, Path(place) / str(steps), steps)) for steps in (few, many)]
        plan = planned(recipe, data, Path(place) / "none", many - few)
        steps = [
            json.loads(line) for line in (Path(place) / str(many) / "metrics.jsonl").read_text().splitlines() if line
        ]
    rows = [row for row in steps if row.get("kind") == "train"]
    tokens = rows[-1]["tokens"] - rows[few - 1]["tokens"]
    expected = Range(**plan["run"])
    seconds = taken[1] - taken[0]
    return {
        "recipe": recipe,
        "steps": many - few,
        "tokens": tokens,
        "tokens_planned": plan["work"]["tokens"],
        "seconds_planned": plan["run"],
        "training_planned": plan["training"],
        "capture_planned": plan["capture"],
        "processor_seconds": seconds,
        "within": expected.low <= seconds <= expected.high,
        "over_low": seconds / expected.low,
        "over_high": seconds / expected.high,
        "rates": plan["rates"]["how"],
        "mflops_a_token": {"draft": plan["work"]["draft"] / 1e6, "target": plan["work"]["target"] / 1e6},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["eagle3", "dflash", "peagle"])
    parser.add_argument("--steps", nargs=2, type=int, default=(4, 16), metavar=("FEW", "MANY"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    rows = []
    for recipe in options.recipes:
        rows.append(measure(recipe, options.data, *options.steps))
        row = rows[-1]
        low, high = row["seconds_planned"]["low"], row["seconds_planned"]["high"]
        print(f"{recipe}: planned {low:.1f} to {high:.1f} s, took {row['processor_seconds']:.1f} s", flush=True)
    machine = {
        "processor": torch.backends.cpu.get_cpu_capability(), "cores": settings.cores(), "threads": 1,
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    if options.json is not None:
        body = {
            "command": f"python benchmarks/plan_time.py --data few.jsonl --steps {' '.join(map(str, options.steps))}"
        }
        options.json.write_text(json.dumps({**body, "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
