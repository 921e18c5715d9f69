"""Tiny runs in real processes: one process per rank serves many cells."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchspec.core import settings
from torchspec.core.parallel import mesh
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.pipeline.launch import launch

HERE = Path(__file__).parent
RunCells = Callable[[Sequence[dict[str, Any]], int, Path], Path]


def _by_path(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tiny_run.py."""
    return _by_path("tiny_run")


@pytest.fixture(scope="session")
def made_up() -> ModuleType:
    """made_up.py."""
    return _by_path("made_up")


@pytest.fixture(scope="session")
def fp8_weights() -> ModuleType:
    """fp8_weights.py."""
    return _by_path("fp8_weights")


@pytest.fixture(scope="session")
def run_cells() -> RunCells:
    """run_cells(cells, ranks, results): the results directory, after every cell has run on that many ranks."""

    def run(cells: Sequence[dict[str, Any]], ranks: int, results: Path) -> Path:
        results.mkdir(parents=True, exist_ok=True)
        stores = [
            TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
            for _ in cells
        ]
        jobs = [{**cell, "port": store.port} for cell, store in zip(cells, stores, strict=True)]
        (results / "cells.json").write_text(json.dumps(jobs))
        command = [sys.executable, str(HERE / "worker.py"), str(results / "cells.json"), str(results)]
        assert launch(command, ranks) == 0
        return results

    return run


@pytest.fixture(scope="session")
def cells() -> ModuleType:
    """cells.py."""
    return _by_path("cells")


@pytest.fixture(scope="session")
def runs(cells: ModuleType, run_cells: RunCells, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Results of all cells of cells.py by number of ranks; 3 ranks first, whose checkpoint 1 rank takes over."""
    directory = tmp_path_factory.mktemp("runs")
    return {ranks: run_cells(cells.CELLS[ranks], ranks, directory / f"{ranks}-ranks") for ranks in (3, 2, 1)}


@pytest.fixture
def context(tiny: ModuleType) -> Iterator[ParallelContext]:
    """A world of one in this process."""
    made = mesh.start(tiny.cpu(), settings.launch())
    yield made
    mesh.shutdown(made)
