"""Log-probabilities over a divided vocabulary: `log_probability_worker.py results/` runs 1, 2 and 3 ranks, forks of one
process, one after the other; each rank writes what it found of every cell, and counts its collectives, in
results/<ranks>/."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from torchspec.core import registry
from torchspec.core.interfaces.device import Communication
from torchspec.core.interfaces.target import VocabularyShards

forked = runpy.run_path(str(Path(__file__).parents[2] / "forked.py"))

DEADLINE = 30
"""Seconds that a collective waits: ranks that disagree about them fail instead of hanging."""


class Counting:
    """Notes how many rows or values each collective is given, and passes it on."""

    def __init__(self, communication: Communication) -> None:
        self._communication = communication
        self.given: list[tuple[str, list[int], str]] = []

    def all_gather(self, tensor: Tensor, group: ProcessGroup) -> Sequence[Tensor]:
        self.given.append(("all_gather", list(tensor.shape), str(tensor.dtype)))
        return self._communication.all_gather(tensor, group)

    def all_reduce(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        self.given.append(("all_reduce", list(tensor.shape), str(tensor.dtype)))
        return self._communication.all_reduce(tensor, group)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_rank(cases: ModuleType, results: Path, rank: int, ranks: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{results}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=DEADLINE)
    )
    group, communication = dist.new_group(list(range(ranks)), backend="gloo"), registry.load_device("cpu").communication
    made: dict[str, Tensor] = {}
    given = {}
    for cell in cases.cells():
        counting = Counting(communication)
        shards = VocabularyShards(
            group=group, communication=counting, target_size=cases.V, sizes=cell.sizes(ranks)  # type: ignore[arg-type]
        )  # fmt: skip
        found = cases.Case.random(cell).part(shards).ours(shards)
        made |= {f"{cell.name}/{name}": value.contiguous() for name, value in found.items()}
        given[cell.name] = counting.given
    (results / f"{rank}.json").write_text(json.dumps(given))
    save_file(made, results / f"{rank}.safetensors")
    dist.destroy_process_group()


def main() -> int:
    torch.set_num_threads(1)
    results, cases = Path(sys.argv[1]), load("log_probability_case")
    failed = 0
    for ranks in cases.SIZES:
        (results / str(ranks)).mkdir()
        jobs = [(cases, results / str(ranks), rank, ranks) for rank in range(ranks)]
        failed |= forked["run_ranks"](run_rank, jobs)
    return failed


if __name__ == "__main__":
    sys.exit(main())
