"""However ranks share sequences or the target's head, loss, metrics and every gradient are one process's.

Ranks are real processes over gloo; the one process is held against the definition in test_oracle.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

WORKER = Path(__file__).with_name("sharing_worker.py")
PACKED = 64
Cell = dict[str, Any]


def cell(name: str, family: str = "mimo-qwen2", **changes: Any) -> Cell:
    return {"name": name, "family": family, "dtype": "float64", "supervision": "dense"} | changes


CELLS = [
    cell("gather", ulysses=2, exchange="gather", supervision="sparse"),
    cell("gather-packed", "deepseek-llama", ring=2, exchange="gather", row_tokens=2 * PACKED),
    cell("ulysses", "qwen-qwen3", ulysses=2, exchange="ulysses", recompute=True),
    cell("ring", ring=2, exchange="ring", row_tokens=2 * PACKED, recompute=True),
    cell("usp", "deepseek-llama", ulysses=2, exchange="usp", supervision="sparse"),
    cell("per-sequence", "qwen-qwen3", ring=2, exchange="ring", options={"normalisation": "per_sequence"}),
    cell("head-by-tokens", ulysses=2, shard_logits="tokens", row_tokens=2 * PACKED),
    cell("head-by-vocabulary", ulysses=2, shard_logits="vocabulary", row_tokens=2 * PACKED, supervision="sparse"),
    cell("data-head-by-vocabulary", "deepseek-llama", shard_logits="vocabulary", options={"objective": {"tv": 1.0}}),
    cell("data-head-by-tokens", "qwen-qwen3", shard_logits="tokens", options={"objective": {"kl": 0.5, "argmax": 1.0}}),
]


def alone(shared: Cell) -> Cell:
    kept = ("family", "dtype", "supervision", "options", "target", "name")
    return {key: value for key, value in shared.items() if key in kept}


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
def results(
    tmp_path_factory: pytest.TempPathFactory, make_target: Callable[..., Path]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """(of two ranks, of one)."""
    cells = [{**each, "target": str(make_target(*each["family"].split("-")))} for each in CELLS]
    directory = tmp_path_factory.mktemp("sharing")
    return run(cells, 2, directory / "two"), run([alone(each) for each in cells], 1, directory / "one")


@pytest.mark.parametrize("name", [each["name"] for each in CELLS])
def test_loss_metrics_and_every_gradient_are_one_processes(results: Any, name: str) -> None:
    got, expected = (found[name] for found in results)
    assert got.keys() == expected.keys()
    assert sum(key.startswith("grad.") for key in got) >= 13
    for key, value in expected.items():
        if key.startswith("grad."):
            assert value.any(), key
        apart = (got[key].double() - value.double()).norm()
        assert apart <= 1e-12 * value.double().norm(), f"{key}: {apart / value.double().norm():.1e}"
