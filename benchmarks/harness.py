"""Pairs, medians and peak memory: the one way figures are made in this folder.

Every variant lives in a process of its own; the parent asks them in turn (A B A B ...), so a machine whose speed
drifts slows all of them alike and the ratio of medians holds. Peak memory is the kernel's high-water mark over the
resident set after warm-up (Linux: `/proc/self/clear_refs`), with malloc told to give freed tensors back.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

Step = Callable[[], object]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Medians over the rounds; MB are 1e6 bytes, over the resident set before the measured calls."""

    cpu_seconds: float
    wall_seconds: float
    peak_mb_over_base: float
    rounds: int


def compare(variants: Mapping[str, Callable[[], Step]], *, rounds: int = 7, threads: int = 1) -> dict[str, Figures]:
    """Measure every variant. A variant is a picklable function that prepares and returns the step to be timed."""
    os.environ.update(MALLOC, OMP_NUM_THREADS=str(threads))
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name, prepare in variants.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, prepare, threads), daemon=True)
        process.start()
        pipes[name] = ours
        processes.append(process)
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            sample = pipe.recv()
            if turn:  # the first is the warm-up
                samples[name].append(sample)
                print(f"  {name:24s} {sample[0]:8.3f} cpu s {sample[2]:8.0f} MB", file=sys.stderr, flush=True)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join(timeout=60)
    return {name: _figures(taken) for name, taken in samples.items()}


def _figures(samples: list[tuple[float, float, float]]) -> Figures:
    cpu, wall, peak = (statistics.median(column) for column in zip(*samples, strict=True))
    return Figures(cpu_seconds=cpu, wall_seconds=wall, peak_mb_over_base=peak, rounds=len(samples))


def _serve(pipe: Connection, prepare: Callable[[], Step], threads: int) -> None:
    torch.set_num_threads(threads)
    step = prepare()
    while pipe.recv():
        base = _resident_peak(reset=True)
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        pipe.send((time.process_time() - cpu, time.perf_counter() - wall, (_resident_peak() - base) / 1e6))


def _resident_peak(*, reset: bool = False) -> int:
    """Bytes; 0 where the system has no such counter (then memory figures are 0, never guessed)."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def machine() -> dict[str, str | int]:
    """Facts that every published figure stands beside."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count() or 0, "torch": torch.__version__, "python": platform.python_version()}


def publish(path: Path | None, *, command: str, settings: dict[str, object], results: dict[str, Figures]) -> None:
    """Print the table; write the JSON when a path is given."""
    first = next(iter(results.values()))
    print(f"{'variant':24s} {'cpu s':>9s} {'wall s':>9s} {'peak MB':>9s} {'ratio':>7s}")
    for name, row in results.items():
        ratio = row.cpu_seconds / first.cpu_seconds
        print(f"{name:24s} {row.cpu_seconds:9.3f} {row.wall_seconds:9.3f} {row.peak_mb_over_base:9.0f} {ratio:7.2f}")
    if path is not None:
        body = {
            "command": command,
            "machine": machine(),
            "settings": settings,
            "results": {name: asdict(row) for name, row in results.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=2) + "\n")
