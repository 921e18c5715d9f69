"""Memory over thousands of steps: how much every process of a run grows.

python benchmarks/leaks.py --json benchmarks/results/leaks.json

Each topology trains on short samples, a step each. While it runs, the resident memory of all its processes is read
together with the step that it has come to; a process's growth is the slope of a straight line through what was read
after the first fifth of the steps, in which caches fill, and before the last. Memory is anonymous and shared pages, not
those of files.

The limit is for torchspec's own processes. Those of Ray are told apart, beside the same ones of a Ray that was started
in the same way at the same time and had nothing to do. `--heap` says what Ray's head holds instead: its allocator then
counts the bytes that are in use (and takes more memory itself, so growth is not told).
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
from dataclasses import dataclass, field
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
HEAD = "gcs_server"
HEAP = "prof:true,prof_active:true,lg_prof_sample:0,lg_prof_interval:22,prof_prefix:"
"""Of jemalloc, in Ray's head: every byte is counted, and all of them told after every 4 MiB that were asked for."""
IDLE = """
import os, sys, time
import ray
from torchspec.core import settings
from torchspec.core.pipeline.cluster import of_its_own
ray.init(log_to_driver=False, **of_its_own(cpus=settings.cores()))
while os.getppid() == int(sys.argv[1]):
    time.sleep(1)
"""


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


@dataclass
class Watched:
    """Of each process (step, megabytes) as the run goes on; `ours`: those that are not Ray's; `idle`: of a Ray without
    work, with the same steps."""

    ours: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    rays: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    idle: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))


def watched(command: list[str], run: Path, mark: str, more: dict[str, str], *, beside: bool) -> Watched:
    """`more`: variables of the run's processes; `beside`: with an idle Ray."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = Watched()
    log, idle = run.with_suffix(".log"), f"{mark}-idle"
    with log.open("w") as output:
        tied = {"stdout": output, "stderr": output, "stdin": subprocess.DEVNULL}
        driver = subprocess.Popen(command, env={**environment, **more, MARK: mark}, **tied)
        if beside:
            alone = [sys.executable, "-P", "-c", IDLE, str(os.getpid())]
            subprocess.Popen(alone, env={**environment, MARK: idle}, **tied)
    try:
        while driver.poll() is None:
            time.sleep(EVERY)
            step = steps_in(run)
            for each in processes(mark) if step else ():
                rays = each.kind == "other" and each.pid != driver.pid
                _note(found.rays if rays else found.ours, f"{name_of(each, driver.pid)} {each.pid}", step, each.pid)
            for each in processes(idle) if step and beside else ():
                if " -c " not in each.words:
                    _note(found.idle, name_of(each, driver.pid), step, each.pid)
    finally:
        end(mark)
        end(idle)
    if driver.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{log.read_text()[-3000:]}")
    return found


def _note(found: dict[str, list[tuple[int, float]]], name: str, step: int, pid: int) -> None:
    size = resident(pid)
    if size is not None:
        found[name].append((step, size))


def in_use(folder: Path) -> list[float]:
    """Megabytes that Ray's head had in use, by its allocator's dumps, oldest first."""
    dumps = sorted(folder.glob("*.heap"), key=lambda path: int(path.suffixes[-2].lstrip(".i")))
    totals = (next(line for line in path.open() if line.startswith("  t*:")) for path in dumps)
    return [int(total.split()[2]) / 1e6 for total in totals]


def growth(points: list[tuple[int, float]], steps: int) -> float | None:
    """MB per 1,000 steps; None of a process that was not there for most of them."""
    late = [(step, size) for step, size in points if steps / 5 < step < steps]  # at the end comes the export
    if len(late) < 10 or late[-1][0] - late[0][0] < steps / 2:
        return None
    x, y = np.array(late, dtype=float).T
    return float(np.polyfit(x, y, 1)[0] * 1000)


def rows(found: dict[str, list[tuple[int, float]]], steps: int) -> dict[str, dict[str, float]]:
    """MB per 1,000 steps, and MB at the first and at the last look."""
    grown = {who: growth(points, steps) for who, points in found.items()}
    return {
        who: {"growth": rate, "first": found[who][0][1], "last": found[who][-1][1]}
        for who, rate in grown.items()
        if rate is not None
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--topology", choices=sorted(TOPOLOGIES), nargs="*", default=sorted(TOPOLOGIES))
    parser.add_argument("--heap", action="store_true", help="what Ray's head has in use, in a disaggregated run")
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
            on_ray = name.startswith("disaggregated")
            more = {"RAY_JEMALLOC_PROFILE": HEAD, "RAY_JEMALLOC_CONF": f"{HEAP}{place}/head"} if options.heap else {}
            points = watched(command, run, f"leaks-{number}", more, beside=on_ray and not options.heap)
            if options.heap:
                told[name] = {"MB in use by Ray's head": [round(size, 3) for size in in_use(place)]}
            else:
                told[name] = {"torchspec": rows(points.ours, options.steps)}
                if on_ray:
                    told[name]["Ray"] = rows(points.rays, options.steps)
                    told[name]["Ray, idle"] = rows(points.idle, options.steps)
            told[name]["seconds"] = round(time.monotonic() - begin)
            print(f"{name}: {json.dumps(told[name], indent=2)}", flush=True)
    growths = [row["growth"] for each in told.values() for row in each.get("torchspec", {}).values()]
    worst = max(growths, default=float("nan"))
    body = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "steps": options.steps,
        "limit, MB per 1,000 steps": LIMIT,
        "most": worst,
        "processes": told,
    }
    write(options.json, body)
    if options.heap:
        return 0
    print(f"most of torchspec's: {worst:.3f} MB per 1,000 steps (limit {LIMIT})")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
