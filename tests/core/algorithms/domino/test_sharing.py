"""However ranks share sequences or the target's head, loss, metrics and every gradient are one process's.

Ranks are real processes over gloo; the one process is held against the definition in test_oracle.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

WORKER = Path(__file__).with_name("sharing_worker.py")
PACKED = 128
Cell = dict[str, Any]


def cell(name: str, **changes: Any) -> Cell:
    return {"name": name, "dtype": "float64", "supervision": "dense", "options": {}} | changes


CELLS = [
    cell("data", supervision="sparse"),
    cell("gather", ulysses=2, exchange="gather", supervision="sparse"),
    cell("ulysses", ulysses=2, exchange="ulysses", recompute=True, row_tokens=PACKED),
    cell("ring", ring=2, exchange="ring", recompute=True, options={"normalisation": "per_sequence"}),
    cell("usp", ulysses=2, exchange="usp", row_tokens=PACKED),
    cell("head-by-vocabulary", ulysses=2, shard_logits="vocabulary", supervision="sparse"),
    cell("nothing", ring=2, exchange="ring", supervision="none"),
]


def run(cells: list[Cell], ranks: int, directory: Path) -> dict[str, dict[str, Tensor]]:
    directory.mkdir()
    (directory / "cells.json").write_text(json.dumps(cells))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    command = [sys.executable, str(WORKER), str(directory / "cells.json"), str(directory), str(ranks), str(store.port)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    errors = "\n".join(path.read_text() for path in sorted(directory.glob("*.error")))
    assert ran.returncode == 0, errors or ran.stderr
    return {path.stem: load_file(path) for path in directory.glob("*.safetensors")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Tensor]], ...]:
    """(of two ranks, of one)."""
    directory = tmp_path_factory.mktemp("sharing")
    kept = ("name", "dtype", "supervision", "options")
    alone = [{name: value for name, value in each.items() if name in kept} for each in CELLS]
    return run(CELLS, 2, directory / "two"), run(alone, 1, directory / "one")


@pytest.mark.parametrize("name", [each["name"] for each in CELLS])
def test_loss_metrics_and_every_gradient_are_one_processes(results: Any, name: str) -> None:
    got, expected = (found[name] for found in results)
    assert got.keys() == expected.keys()
    assert "sum.sums/base_correct" in got
    for key, value in expected.items():
        if key.startswith("grad."):
            assert bool(value.any()) == (name != "nothing"), key
        apart = (got[key].double() - value.double()).norm()
        assert apart <= 1e-12 * value.double().norm(), f"{key}: {apart / value.double().norm():.1e}"
