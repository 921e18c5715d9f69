"""How far FP8 takes a training from bf16: loss curve and decoded acceptance on the embedded target's quickstart recipe.

python benchmarks/fp8_accuracy.py --json benchmarks/results/fp8_embedded.json

The same seed, data, order and steps in every precision; float32 stands beside them to show how far bf16 itself is from
it. Losses are compared as means of windows of steps; acceptance is that of each draft, decoded greedily in float32. It
runs on the CPU, where FP8 is emulated: nothing here is speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import machine, write
from runs import Run, train

from torchspec.cli.commands.quickstart import RECIPE, embedded_answers
from torchspec.cli.schemas import TargetOptions

BASE = "bfloat16"
PRECISIONS = {
    "bfloat16": ("precision.compute=bfloat16",),
    "fp8, row": ("precision.compute=fp8", "precision.fp8_scaling=row"),
    "fp8, tensor": ("precision.compute=fp8", "precision.fp8_scaling=tensor"),
    "float32": ("precision.compute=float32",),
}
LOSS_LIMIT, ACCEPTANCE_LIMIT = 0.01, 0.02


def decoded(draft: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of `torchspec eval`."""
    words = ["--target", "embedded", "--draft", str(draft), "--data", str(data), "--samples", str(options.samples)]
    words += ["--max-new-tokens", str(options.max_new_tokens), "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "torchspec", "eval", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return {name: found[name] for name in ("acceptance_length", "acceptance_per_position", "rounds", "tokens")}


def curve(run: Run, window: int) -> list[float]:
    """Mean losses of the windows, the first steps' left out: they fall faster than anything differs."""
    losses = run.losses()
    return [fmean(losses[start : start + window]) for start in range(window, len(losses) - window + 1, window)]


def against(base: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    deviations = [b / a - 1 for a, b in zip(base["loss per window"], other["loss per window"], strict=True)]
    return {
        "loss, mean of windows": fmean(deviations),
        "loss, worst window": max(deviations, key=abs),
        "loss, last window": deviations[-1],
        "acceptance length": other["decoded"]["acceptance_length"] / base["decoded"]["acceptance_length"] - 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--window", type=int, default=20, help="steps of a point of the curve")
    parser.add_argument("--answers", type=int, default=3000, help="of the target, that are trained on")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=96, help="held-out prompts decoded")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--precisions", nargs="*", choices=sorted(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if BASE not in options.precisions:
        parser.error(f"without {BASE} there is nothing to compare with")
    found: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="torchspec-fp8-") as text,
        resources.as_file(resources.files("torchspec") / "assets" / "recipes" / RECIPE) as recipe,
    ):
        place = Path(text)
        data = place / "data"
        answers = embedded_answers(TargetOptions(target=Path("embedded")), data, options.answers, 1)
        common = [
            "--device", "cpu", "--config", str(recipe), "--data", *map(str, answers),
            f"train.max_steps={options.steps}", f"data.max_length={options.max_length}",
            f"data.cache_dir={place / 'cache'}",
        ]  # fmt: skip
        for name in options.precisions:
            run = train(place / "run", [*common, *PRECISIONS[name]])
            found[name] = {
                "loss per window": curve(run, options.window),
                "decoded": decoded(place / "run" / "draft", data / "test.jsonl", options),
            }
            compared = {other: against(found[BASE], row) for other, row in found.items() if BASE in found}
            body = {
                "command": shlex.join(["python", *sys.argv]),
                "machine": machine(),
                "emulated": True,
                "steps": options.steps,
                "limits": {"loss": LOSS_LIMIT, "acceptance length": ACCEPTANCE_LIMIT},
                f"relative to {BASE}": {other: row for other, row in compared.items() if other != BASE},
                "runs": found,
            }
            write(options.json, body)
            print(name, found[name]["decoded"]["acceptance_length"], compared.get(name), flush=True)
    rows = [row for name, row in compared.items() if name.startswith("fp8")]
    kept = all(
        max(abs(row["loss, mean of windows"]), abs(row["loss, last window"])) <= LOSS_LIMIT
        and row["acceptance length"] >= -ACCEPTANCE_LIMIT
        for row in rows
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
