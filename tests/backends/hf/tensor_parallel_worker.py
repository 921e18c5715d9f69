"""Targets that several ranks hold together: `tensor_parallel_worker.py cells.json results/`.

Four real ranks serve all cells. A cell names a target and over how many ranks it is split: 4, or 2 in two groups, which
hold a copy each. Every rank writes all that its engine gave it.
"""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from torchspec.backends.api import CaptureRequest, EngineOptions, TargetError
from torchspec.backends.hf import target as target_module
from torchspec.backends.hf.engine import HfEngine
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.registry import load_device

forked = runpy.run_path(str(Path(__file__).parents[2] / "forked.py"))

RANKS = 4
# No user runs a target in float64; a test does, to tell rounding from error.
target_module.DTYPES["float64"] = torch.float64


@dataclass
class Answers:
    """All that an engine says about fixed questions."""

    tensors: dict[str, Tensor]
    texts: dict[str, Any]


def questions(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def ask(engine: HfEngine) -> Answers:
    """Capture in both norm states, text greedy and drawn, a decode session (of one row where rows share no cache)."""
    layers = tuple(range(engine.describe().num_layers))
    tensors: dict[str, Tensor] = {}
    for state in ("post_norm", "pre_norm"):
        engine.norm_state = state  # type: ignore[assignment]
        sink = MemoryStore()
        batch = [CaptureRequest(record_id=f"s{n}", input_ids=ids) for n, ids in enumerate(questions(0, 11, 3, 1, 8))]
        for ref in engine.capture(batch, layers, sink):
            features = take(sink, ref)
            tensors[f"{state}.{ref.record_id}.taps"] = features.taps_TNH
            tensors[f"{state}.{ref.record_id}.last"] = features.last_TH
    asked = questions(1, 9, 2, 1, 14)
    texts = {
        "greedy": engine.generate(asked, max_new_tokens=8),
        "drawn": engine.generate(asked, max_new_tokens=8, temperature=1.0, seed=5),
    }
    rows = 3 if engine._target.rollback == "full" else 1
    session = engine.open(questions(2, 6, 4, 9)[:rows], (1, 0))
    tensors["prefill"] = session.prefill.logits_BV
    for row, taps in enumerate(session.prefill.taps):
        tensors[f"prefill.{row}"] = taps
    for turn, new in enumerate((4, 3, 2)):
        output = session.step(torch.tensor(questions(3 + turn, *[new] * rows)))
        tensors[f"step.{turn}.logits"], tensors[f"step.{turn}.taps"] = output.logits_BnV, output.taps_BnNH
        if turn == 0:
            session.rollback(torch.tensor([2, 0, 4][:rows]))
        elif turn == 1 and rows == 3:
            session.keep([2, 0])
            rows = 2
    return Answers(tensors=tensors, texts=texts)


def run_cells(cells: list[dict[str, Any]], results: Path, rank: int) -> None:
    meshes = {
        RANKS: init_device_mesh("cpu", (RANKS,)),
        2: init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "tensor"))["tensor"],
    }
    for cell in cells:
        mesh, name = meshes[cell["size"]], f"{cell['name']}-{cell['size']}-{rank}"
        options = EngineOptions(
            target=Path(cell["target"]), device=load_device("cpu"), dtype=cell["dtype"], tensor_mesh=mesh
        )
        try:
            engine = HfEngine.load(options)
        except TargetError as error:
            found: dict[str, Any] = {"error": str(error)}
        else:
            answers = ask(engine)
            save_file({key: value.contiguous() for key, value in answers.tensors.items()}, results / name)
            layers = engine._target.layers
            held = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
            found = {**answers.texts, "held": held, "vocabulary": engine.describe().vocab_size}
        (results / f"{name}.json").write_text(json.dumps(found))


def run_rank(cells: list[dict[str, Any]], results: Path, rank: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{results / 'meet'}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    run_cells(cells, results, rank)
    dist.destroy_process_group()


def main() -> int:
    torch.set_num_threads(1)
    cells, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    failed: int = forked["run_ranks"](run_rank, [(cells, results, rank) for rank in range(RANKS)])
    return failed


if __name__ == "__main__":
    sys.exit(main())
