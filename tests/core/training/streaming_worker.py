"""Ranks that stream: `streaming_worker.py cells.json results/ ranks port`.

The ranks are forks of one process; each runs every cell: the turns of a plan through a `StreamingFeed` with engines of
its own that note what they are asked for. Rank r writes what came of a cell to `<name>.<r>.safetensors` and `.json`,
and what an engine is asked for that makes the same features when they are needed.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from torchspec.core.interfaces.engine import CaptureRequest
from torchspec.core.parallel import mesh
from torchspec.core.training.capturing import Documents, captured_rows
from torchspec.core.training.plan import Cut, Plan, Shares
from torchspec.core.training.streaming import StreamingFeed

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
    refused = cell["refused"] if context.sequence_rank == cell["refusing"] else []
    engines = [made_up.Engine(refused) for _ in range(cell["engines"])]
    direct = made_up.Engine(refused)
    plan = Plan(
        samples.lengths, Cut(**cell["cut"]), Shares(indices=context.captured_with, of=context.data_size),
        batch_size=cell["batch_size"], bucket_size=1, seed=0,
    )  # fmt: skip
    model = made_up.model(cell["halo"])
    feed = StreamingFeed(model, context, engines, name="run", budget=cell["budget"], patience=30.0)
    feed.start(plan, samples, 0, cell["steps"])
    tensors: dict[str, Tensor] = {}
    turns: list[Any] = []
    for turn in plan.turns_from(0, cell["steps"]):
        loaded = {index: Documents.of(each, samples, turn.some) for index, each in turn.micro_batches.items()}
        rows, holes = feed.rows(turn, loaded)
        tensors |= {f"{len(turns)}.{name}": each.contiguous() for name, each in made_up.tensors(rows).items()}
        turns.append([turn.step, turn.number, holes])
        captured_rows(replace(model, engine=direct), loaded, context)
    feed.close()
    found = {
        "place": [context.data_rank, context.sequence_rank],
        "turns": turns,
        "asked": [[described(call) for call in engine.asked] for engine in engines],
        "direct": [described(call) for call in direct.asked if call],
    }
    place = results / f"{cell['name']}.{context.rank}"
    save_file(tensors, f"{place}.safetensors")
    Path(f"{place}.json").write_text(json.dumps(found))


def described(call: Sequence[CaptureRequest]) -> list[dict[str, Any]]:
    return [{"id": r.record_id, "ids": list(r.input_ids), "parts": r.parts, "part": r.part} for r in call]


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
