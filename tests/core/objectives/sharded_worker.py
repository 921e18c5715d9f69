"""The loss over a divided head: `sharded_worker.py results/` runs 2, 3 and 4 ranks, forks of one process, one after
the other; each rank writes what it found of every cell to results/<ranks>/."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.core import registry
from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.objectives.distillation import PairTerms

forked = runpy.run_path(str(Path(__file__).parents[2] / "forked.py"))

DEADLINE = 30
"""Seconds that a collective waits: ranks that disagree about them fail instead of hanging."""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watching(TorchDispatchMode):
    """Notes the largest tensor that any operator makes, and what the collectives are given to send, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for out in found if isinstance(found, tuple | list) else (found,):
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            given = args[1] if name in ("_allgather_base_", "alltoall_base_") else args[0]
            tensors = given if isinstance(given, list | tuple) else [given]
            self.sent[name] = self.sent.get(name, 0) + sum(x.numel() * x.element_size() for x in tensors)
        return found


def run_rank(sharded: ModuleType, results: Path, rank: int, ranks: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{results}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=DEADLINE)
    )
    group, communication = dist.new_group(list(range(ranks)), backend="gloo"), registry.load_device("cpu").communication
    made: dict[str, torch.Tensor] = {}
    for cell in [*sharded.cells(), *sharded.watched()]:
        shards = VocabularyShards(group=group, communication=communication, target_size=cell.vocabulary)
        mine = sharded.part(sharded.whole(cell, ranks), cell, shards)
        if cell.watched:
            with Watching() as watching:
                mine.run(cell.most_rows, FusedOps(), survey=cell.survey)
            report = {"largest": watching.largest, "sent": watching.sent}
            (results / f"{cell.name}-{rank}.json").write_text(json.dumps(report))
            continue
        found = mine.run(cell.most_rows, survey=cell.survey)
        made |= {f"{cell.name}/{name}": value for name, value in found.gradients().items()}
        terms = {each.name: getattr(found.terms, each.name) for each in fields(PairTerms)}
        made |= {f"{cell.name}/{name}": value for name, value in terms.items() if value is not None}
        made[f"{cell.name}/loss"] = found.loss
    save_file({name: value.contiguous() for name, value in made.items()}, results / f"{rank}.safetensors")
    dist.destroy_process_group()


def main() -> int:
    torch.set_num_threads(1)
    results, sharded = Path(sys.argv[1]), load("sharded_case")
    failed = 0
    for ranks in sharded.BOUNDS:
        (results / str(ranks)).mkdir()
        jobs = [(sharded, results / str(ranks), rank, ranks) for rank in range(ranks)]
        failed |= forked["run_ranks"](run_rank, jobs)
    return failed


if __name__ == "__main__":
    sys.exit(main())
