"""Ranks that share sequences and read captured features: `stored_worker.py cells.json results/ ranks port`.

The ranks are forks of one process; each runs every cell: the turns of a plan through a `StoredFeed`. Rank r writes what
came of a cell to `<name>.<r>.safetensors` and `.json`.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed as dist

from torchspec.core.features.manifest import Manifest
from torchspec.core.parallel import mesh
from torchspec.core.training.capturing import Documents
from torchspec.core.training.plan import Cut, Plan, Shares
from torchspec.core.training.stored import StoredFeatures, StoredFeed

forked = runpy.run_path(str(Path(__file__).parents[2] / "forked.py"))

Cell = dict[str, Any]
DEADLINE = timedelta(seconds=60)


def load_made_up() -> ModuleType:
    spec = importlib.util.spec_from_file_location("made_up", Path(__file__).with_name("made_up.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["made_up"] = module
    spec.loader.exec_module(module)
    return module


def run(made_up: ModuleType, cell: Cell, results: Path, context: mesh.ParallelContext) -> None:
    samples = made_up.Ragged(cell["lengths"])
    plan = Plan(
        samples.lengths, Cut(**cell["cut"]), Shares(indices=context.captured_with, of=context.data_size),
        batch_size=cell["batch_size"], bucket_size=1, seed=0,
    )  # fmt: skip
    directory = Path(cell["features"])
    features = StoredFeatures(directory=directory, manifest=Manifest.load(directory), budget=cell["budget"])
    feed = StoredFeed(made_up.model(cell["halo"]), context, features)
    feed.start(plan, samples, 0, plan.steps_per_epoch)
    tensors, turns = {}, []
    for turn in plan.turns_from(0, plan.steps_per_epoch):
        loaded = {index: Documents.of(each, samples, turn.some) for index, each in turn.micro_batches.items()}
        rows, holes = feed.rows(turn, loaded)
        tensors |= {f"{len(turns)}.{name}": each.contiguous() for name, each in made_up.tensors(rows).items()}
        mine = loaded[context.data_rank]
        turns.append({"indices": mine.indices, "packs": mine.packs, "some": turn.some, "holes": holes})
    feed.close()
    place = results / f"{cell['name']}.{context.rank}"
    save_file(tensors, f"{place}.safetensors")
    place = [context.data_rank, context.sequence_rank]
    (results / f"{cell['name']}.{context.rank}.json").write_text(json.dumps({"place": place, "turns": turns}))


def rank_main(cells: list[Cell], results: Path, rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    made_up, meshes = load_made_up(), forked["Meshes"](rank, ranks, port, DEADLINE)
    for cell in cells:
        run(made_up, cell, results, meshes.context(cell["ulysses"], cell["ring"]))
    dist.destroy_process_group()


def main() -> int:
    cells, results, ranks, port = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *map(int, sys.argv[3:])
    failed: int = forked["run_ranks"](rank_main, [(cells, results, rank, ranks, port) for rank in range(ranks)])
    return failed


if __name__ == "__main__":
    sys.exit(main())
