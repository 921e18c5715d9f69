"""Trainings by the command line, for benchmarks that compare whole runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = ("the", "list", "of", "values", "is", "sorted", "and", "every", "function", "returns", "a", "new", "object")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows of the steps, and seconds of the whole command."""

    rows: list[dict[str, Any]]
    seconds: float

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    def later(self, skip: int) -> list[dict[str, Any]]:
        """Without the first steps, in which everything warms up."""
        return self.rows[skip:]


def write_conversations(path: Path, count: int, words: int, seed: int = 0) -> Path:
    """Random ones, of about so many words each."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            question, answer = (" ".join(draw.choices(WORDS, k=words // 2)) for _ in range(2))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": f"c{number}", "messages": messages}) + "\n")
    return path


def train(
    output: Path, words: Sequence[str], *, threads: int = 1, command: str = "train", pinned: Sequence[str] = ()
) -> Run:
    """From the beginning, in a process of its own; SystemExit with its log when it fails. `pinned`: words before the
    command that bind it to cores."""
    shutil.rmtree(output, ignore_errors=True)
    begin = time.monotonic()
    done = subprocess.run(
        [*pinned, sys.executable, "-P", "-m", "torchspec", command, "--output", str(output), *words],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    seconds = time.monotonic() - begin
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return Run(rows=[row for row in map(json.loads, lines) if row["kind"] == "train"], seconds=seconds)
