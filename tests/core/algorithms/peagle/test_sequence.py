"""However ranks share sequences, loss, metrics and every gradient are those of one process that owns everything.

Ranks are real processes over gloo (tests/core/parallel/sequence_worker.py).
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

WORKER = Path(__file__).parents[2] / "parallel/sequence_worker.py"
Cell = dict[str, Any]
SHARED = (
    (2, 1, "ulysses"),
    (2, 1, "gather"),
    (1, 2, "ring"),
    (1, 2, "usp"),
    (2, 2, "usp"),
    (2, 2, "gather"),
    (4, 1, "ulysses"),
    (1, 4, "ring"),
)
PROBLEMS: dict[str, Cell] = {
    "dense": {"supervision": "dense", "options": {"num_layers": 2}},
    "sparse": {"supervision": "sparse", "options": {"num_layers": 2, "normalisation": "per_sequence"}},
    "none": {"supervision": "none", "options": {"num_layers": 1}},
}


def cell(problem: str, ulysses: int, ring: int, exchange: str, *, packed: bool, recompute: bool) -> Cell:
    return {
        **PROBLEMS[problem],
        "problem": problem,
        "dtype": "float64",
        "algorithm": "peagle",
        "steps": {"depths": 4},
        "ulysses": ulysses,
        "ring": ring,
        "exchange": exchange,
        "recompute": recompute,
        **({"row_tokens": 61 * ulysses * ring} if packed else {}),
        "name": f"{problem}-{ulysses}x{ring}-{exchange}-{'packed' if packed else 'rows'}",
    }


CELLS = [
    cell(problem, *shared, packed=packed, recompute=packed)
    for shared in SHARED
    for problem, packed in (("dense", False), ("dense", True), ("sparse", True), ("none", False))
]
REFERENCES = [cell(problem, 1, 1, "gather", packed=False, recompute=False) for problem in PROBLEMS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """By cell."""
    found = {}
    for ranks in (1, 2, 4):
        here = tmp_path_factory.mktemp(f"ranks{ranks}")
        chosen = [one for one in [*REFERENCES, *CELLS] if one["ulysses"] * one["ring"] == ranks]
        (here / "cells.json").write_text(json.dumps(chosen))
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        command = [sys.executable, str(WORKER), str(here / "cells.json"), str(here), str(ranks), str(store.port)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        errors = "\n".join(path.read_text() for path in sorted(here.glob("*.error")))
        assert ran.returncode == 0, errors or ran.stderr
        found |= {path.stem: load_file(path) for path in here.glob("*.safetensors")}
    return found


@pytest.mark.parametrize("chosen", CELLS, ids=lambda chosen: chosen["name"])
def test_loss_metrics_and_every_gradient_are_one_processes(results: dict[str, dict[str, Tensor]], chosen: Cell) -> None:
    got, expected = results[chosen["name"]], results[f"{chosen['problem']}-1x1-gather-rows"]
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        apart = (got[name].double() - value.double()).norm()
        assert apart <= 1e-12 * value.double().norm(), (name, float(apart))
        if chosen["problem"] != "none" and name.startswith("grad."):
            assert value.any(), name
