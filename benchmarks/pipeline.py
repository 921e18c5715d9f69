"""End to end, against the slower of engine and trainer alone.

python benchmarks/pipeline.py --json benchmarks/results/pipeline.json

Pairs of runs of the same work in one go, each with one thread a process. Inside one process engine and trainer take
turns, so its steps tell what each of them takes alone: the capture, and the rest of the step. A pipeline in which they
work at the same time should be as fast as the slower of the two.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from harness import machine, write
from runs import Run, train, write_conversations

SKIP = 8
LIMIT = 0.9
TOPOLOGIES = {
    "colocated": ("--topology", "colocated"),
    "disaggregated": ("--topology", "disaggregated"),
    "disaggregated, Mooncake": ("--topology", "disaggregated", "pipeline.store=mooncake", "engine.store_mb=400"),
}


def tokens(run: Run) -> int:
    counted = [row["tokens"] for row in run.rows]
    return int(counted[-1] - counted[SKIP - 1])


def alone(run: Run) -> tuple[float, float]:
    """Tokens a second of the engine and of the trainer, of a run in which they take turns."""
    capture = sum(row["time"]["capture"] for row in run.later(SKIP))
    whole = sum(row["step_seconds"] for row in run.later(SKIP))
    return tokens(run) / capture, tokens(run) / (whole - capture)


def together(run: Run) -> float:
    return tokens(run) / sum(row["step_seconds"] for row in run.later(SKIP))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--words", type=int, default=400, help="of a conversation")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prefetch-mb", type=int, default=50)
    parser.add_argument("--topology", choices=sorted(TOPOLOGIES), nargs="*", default=sorted(TOPOLOGIES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.topology}
    with tempfile.TemporaryDirectory(prefix="torchspec-pipeline-") as text:
        place = Path(text)
        data = write_conversations(place / "data.jsonl", options.steps * options.batch, options.words)
        common = [
            "--device", "cpu", "--target", "embedded", "--data", str(data), f"train.batch_size={options.batch}",
            f"train.micro_batch_size={options.batch}", f"train.max_steps={options.steps}",
            "train.checkpoint_every=1000", "data.max_length=1024", "draft.vocab_size=2000",
            f"data.cache_dir={place / 'cache'}",
        ]  # fmt: skip
        for number in range(options.rounds):
            inside = train(place / "inside", common)
            engine, trainer = alone(inside)
            for name in options.topology:
                words = [*common, *TOPOLOGIES[name], f"pipeline.prefetch_mb={options.prefetch_mb}"]
                run = train(place / "apart", words)
                if run.losses() != inside.losses():
                    raise SystemExit(f"{name} has other losses than inprocess")
                row = {"engine": engine, "trainer": trainer, "together": together(run)}
                row["ratio"] = row["together"] / min(engine, trainer)
                found[name].append(row)
                print(number, name, {key: round(value, 3) for key, value in row.items()}, flush=True)
    ratios = {name: median(row["ratio"] for row in rows) for name, rows in found.items()}
    body: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "limit": LIMIT,
        "median ratio to the slower of engine and trainer alone": ratios,
        "tokens per second": found,
    }
    write(options.json, body)
    print(ratios)
    return 0 if min(ratios.values()) >= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
