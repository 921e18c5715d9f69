"""Runs of tests, and what came of them; a fixture loads this file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchspec.core.config.load import load_config
from torchspec.core.pipeline.inprocess import train

Row = dict[str, Any]


def alone(
    values: dict[str, Any], run: Path, *words: str, progress: Callable[[str, int, int], None] | None = None
) -> Path:
    config, provenance = load_config(values={**values, "output": str(run)}, overrides=words)
    train(config, provenance=provenance, progress=progress)
    return run


def two_ranks(values: dict[str, Any], jobs: dict[Path, tuple[str, ...]]) -> None:
    """A run for each directory, one after the other."""
    stores = [
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)) for _ in jobs
    ]
    told = [
        {"values": {**values, "output": str(run)}, "words": words, "port": store.port}
        for (run, words), store in zip(jobs.items(), stores, strict=True)
    ]
    file = next(iter(jobs)).with_suffix(".json")
    file.write_text(json.dumps(told))
    command = [sys.executable, str(Path(__file__).with_name("topology_worker.py")), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def rows(run: Path, kind: str = "train") -> list[Row]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def figures(run: Path) -> list[tuple[Any, ...]]:
    """Of every step, to the last bit."""
    return [tuple(row[name] for name in ("step", "loss", "grad_norm", "tokens", "samples")) for row in rows(run)]
