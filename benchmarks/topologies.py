"""Device-hours and loss curve of the topologies, on the same work.

python benchmarks/topologies.py --json benchmarks/results/topologies.json

A device of a CPU is a thread here: a run in one process has one, for engine and trainer by turns; one with engines of
their own has another for each engine. The loss curves must be equal to the last bit.
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
from runs import train, write_conversations

SKIP = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    curve: list[float] = []
    with tempfile.TemporaryDirectory(prefix="torchspec-topologies-") as text:
        place = Path(text)
        data = write_conversations(place / "data.jsonl", options.steps * 4, 300)
        common = [
            "--device", "cpu", "--target", "embedded", "--data", str(data), "train.batch_size=4",
            "train.micro_batch_size=4", "data.max_length=1024", "draft.vocab_size=2000",
            f"data.cache_dir={place / 'cache'}",
        ]  # fmt: skip
        captured = train(place / "features", common, command="capture")
        common += [f"train.max_steps={options.steps}", "train.checkpoint_every=1000"]
        cases = {
            "inprocess": (1, ()),
            "colocated, engine and trainer on one thread": (1, ("--topology", "colocated")),
            "disaggregated, a thread each": (2, ("--topology", "disaggregated")),
            "offline": (1, ("--topology", "offline", f"pipeline.features={place / 'features'}")),
        }
        for number in range(options.rounds):
            for name, (devices, words) in cases.items():
                pinned = ("taskset", "-c", "0") if devices == 1 else ()
                run = train(place / "run", [*common, *words], pinned=pinned)
                curve = curve or run.losses()
                if run.losses() != curve:
                    raise SystemExit(f"{name} has another loss curve")
                spent = sum(row["step_seconds"] for row in run.later(SKIP))
                seconds.setdefault(name, []).append(spent * devices)
                print(number, name, f"{spent:.2f} s on {devices} device(s)", flush=True)
    base = median(seconds["inprocess"])
    body: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "device-seconds of the steps, median": {name: median(each) for name, each in seconds.items()},
        "device-seconds over inprocess": {name: median(each) / base for name, each in seconds.items()},
        "seconds of `torchspec capture`, start included": captured.seconds,
        "loss curve, of all of them": curve,
    }
    write(options.json, body)
    print(body["device-seconds over inprocess"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
