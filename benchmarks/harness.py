"""Pairs, medians and peak memory: the one way figures are made in this folder.

Every variant lives in a process of its own; the parent asks them in turn (A B A B ...), so a machine whose speed
drifts slows all of them alike and the ratio of medians holds. Time is measured with memory handled as users have it;
peak memory in other processes, whose malloc gives freed tensors back at once: the kernel's high-water mark over the
resident set before the measured call, after a warm-up (Linux: `/proc/self/clear_refs`). On a CUDA device time is that
of events, and memory the allocator's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], Mapping[str, float] | float]
"""A call to be measured; it may return seconds of its parts by name."""

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Medians over the rounds; MB are 1e6 bytes. `parts` are what the step itself returned by name."""

    cpu_seconds: float
    wall_seconds: float
    peak_mb_over_base: float
    rounds: int
    parts: dict[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, float]:
        return {
            "cpu_seconds": self.cpu_seconds,
            "wall_seconds": self.wall_seconds,
            "peak_mb_over_base": self.peak_mb_over_base,
        }


def compare(
    variants: Mapping[str, Callable[[], Step]],
    *,
    weighed: Collection[str],
    rounds: int = 7,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Figures]:
    """Measure every variant's time, and the memory of those `weighed`.

    A variant is a picklable function that prepares and returns the step to be timed.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    timed = _Processes(variants, threads, device)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in variants:
            sample = timed.ask(name)
            if turn:  # the first is the warm-up
                samples[name].append(sample)
                print(f"  {name:16s} {sample['cpu']:8.3f} cpu s", file=sys.stderr, flush=True)
    timed.close()
    peaks = dict.fromkeys(variants, 0.0)
    for name in weighed:
        os.environ.update(GIVE_BACK if device == "cpu" else {})
        alone = _Processes({name: variants[name]}, threads, device)
        alone.ask(name)
        peaks[name] = alone.ask(name)["peak"]
        print(f"  {name:16s} {peaks[name]:8.0f} MB over base", file=sys.stderr, flush=True)
        alone.close()
        for variable in GIVE_BACK:
            os.environ.pop(variable, None)
    return {name: _figures(taken, peaks[name]) for name, taken in samples.items()}


def _figures(samples: list[dict[str, Any]], peak: float) -> Figures:
    def middle(values: list[float]) -> float:
        return statistics.median(values)

    return Figures(
        cpu_seconds=middle([sample["cpu"] for sample in samples]),
        wall_seconds=middle([sample["wall"] for sample in samples]),
        peak_mb_over_base=peak,
        rounds=len(samples),
        parts={part: middle([sample["parts"][part] for sample in samples]) for part in samples[0]["parts"]},
    )


class _Processes:
    """One process per variant, asked over pipes."""

    def __init__(self, variants: Mapping[str, Callable[[], Step]], threads: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for name, prepare in variants.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, prepare, threads, device), daemon=True)
            process.start()
            theirs.close()  # so that a child that dies is noticed
            self._pipes[name] = ours
            self._processes.append(process)

    def ask(self, name: str) -> dict[str, Any]:
        try:
            self._pipes[name].send(True)
            answer: dict[str, Any] = self._pipes[name].recv()
        except (EOFError, BrokenPipeError):
            raise SystemExit(f"the process of {name!r} died; its message is above") from None
        return answer

    def close(self) -> None:
        for pipe in self._pipes.values():
            pipe.send(False)
        for process in self._processes:
            process.join(timeout=60)


def _serve(pipe: Connection, prepare: Callable[[], Step], threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    step = prepare()
    measure = _on_cuda if device == "cuda" else _on_cpu
    while pipe.recv():
        pipe.send(measure(step))


def _on_cpu(step: Step) -> dict[str, Any]:
    base = _resident_peak(reset=True)
    cpu, wall = time.process_time(), time.perf_counter()
    parts = step()
    return {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "peak": (_resident_peak() - base) / 1e6,
        "parts": parts if isinstance(parts, Mapping) else {},
    }


def _on_cuda(step: Step) -> dict[str, Any]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base, cpu = torch.cuda.memory_allocated(), time.process_time()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    parts = step()
    last.record()
    torch.cuda.synchronize()
    return {
        "cpu": time.process_time() - cpu,
        "wall": first.elapsed_time(last) / 1e3,
        "peak": (torch.cuda.max_memory_allocated() - base) / 1e6,
        "parts": parts if isinstance(parts, Mapping) else {},
    }


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
    facts: dict[str, str | int] = {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def write(path: Path | None, body: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=2) + "\n")
