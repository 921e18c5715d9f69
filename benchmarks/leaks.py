"""Memory over thousands of steps: how much every process of a run grows.

python benchmarks/leaks.py --json benchmarks/results/leaks.json

Each topology trains on short samples, a step each. While it runs, the resident memory of all its processes is read
together with the step that it has come to; a process's growth is the slope of a straight line through what was read
after the first fifth of the steps, in which caches fill, and before the last. Memory is anonymous and shared pages, not
those of files.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from chaos import MARK, Process, end, processes
from harness import machine, write
from runs import write_conversations

TOPOLOGIES = {
    "inprocess": (),
    "colocated": ("--topology", "colocated"),
    "colocated, on-policy": (
        "--topology",
        "colocated",
        "--on-policy",
        "on_policy.max_new_tokens=4",
        "on_policy.draft_length=2",
    ),
    "disaggregated, Mooncake": ("--topology", "disaggregated", "pipeline.store=mooncake", "engine.store_mb=100"),
}
LIMIT = 1.0
"""MB (1e6 bytes) per 1,000 steps."""
EVERY = 1.0
SAMPLES = 500


def resident(pid: int) -> float | None:
    """Megabytes; None when it is gone."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return None
    sizes = [int(line[1]) for line in lines if line and line[0] in ("RssAnon:", "RssShmem:")]
    return sum(sizes) * 1024 / 1e6 if sizes else None


def steps_in(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def name_of(process: Process, driver: int) -> str:
    """Of Ray's own processes the program."""
    if process.pid == driver:
        return "driver"
    if process.kind != "other":
        return process.kind
    words = process.words.split()
    return next((Path(word).name for word in words if word.endswith(".py")), Path(words[0]).name)


def watched(command: list[str], run: Path, mark: str) -> dict[str, list[tuple[int, float]]]:
    """Of each process (step, megabytes) as the run goes on."""
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    log = run.with_suffix(".log")
    with log.open("w") as output:
        driver = subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        while driver.poll() is None:
            time.sleep(EVERY)
            step = steps_in(run)
            for each in processes(mark) if step else ():
                size = resident(each.pid)
                if size is not None:
                    found[f"{name_of(each, driver.pid)} {each.pid}"].append((step, size))
    finally:
        end(mark)
    if driver.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{log.read_text()[-3000:]}")
    return found


def growth(points: list[tuple[int, float]], steps: int) -> float | None:
    """MB per 1,000 steps; None of a process that was not there for most of them."""
    late = [(step, size) for step, size in points if steps / 5 < step < steps]  # at the end comes the export
    if len(late) < 10 or late[-1][0] - late[0][0] < steps / 2:
        return None
    x, y = np.array(late, dtype=float).T
    return float(np.polyfit(x, y, 1)[0] * 1000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--topology", choices=sorted(TOPOLOGIES), nargs="*", default=sorted(TOPOLOGIES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    told: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="torchspec-leaks-") as text:
        place = Path(text)
        data = write_conversations(place / "data.jsonl", SAMPLES, 8)
        for number, name in enumerate(options.topology):
            run = place / f"run-{number}"
            command = [
                sys.executable, "-P", "-m", "torchspec", "train", "--device", "cpu", "--target", "embedded", "--data",
                str(data), "--output", str(run), *TOPOLOGIES[name], "train.batch_size=1", "train.micro_batch_size=1",
                f"train.epochs={-(-options.steps // SAMPLES)}", f"train.max_steps={options.steps}",
                "train.checkpoint_every=500", "data.max_length=40", "draft.vocab_size=500", "draft.unroll=1",
                f"data.cache_dir={place / 'cache'}",
            ]  # fmt: skip
            begin = time.monotonic()
            points = watched(command, run, f"leaks-{number}")
            grown = {who: growth(each, options.steps) for who, each in points.items()}
            told[name] = {
                who: {"growth": rate, "first": points[who][0][1], "last": points[who][-1][1]}
                for who, rate in grown.items()
                if rate is not None
            }
            print(f"{name}, {time.monotonic() - begin:.0f} s: {json.dumps(told[name], indent=2)}", flush=True)
    worst = max((each["growth"] for rows in told.values() for each in rows.values()), default=float("nan"))
    body = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "steps": options.steps,
        "limit, MB per 1,000 steps": LIMIT,
        "most": worst,
        "processes": told,
    }
    write(options.json, body)
    print(f"most: {worst:.3f} MB per 1,000 steps (limit {LIMIT})")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
