"""However ranks share sequences, block attention and all its gradients are those of one process that owns everything.

Ranks are real processes over gloo. tests/devices/test_block_attention.py holds the one process against the definition.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchspec.core.attention.block import BlockForm, BlockMask, block_attention
from torchspec.core.parallel.shards import Layout
from torchspec.core.registry import load_device

WORKER = Path(__file__).with_name("block_worker.py")
Cell = dict[str, Any]
Tensors = dict[str, Tensor]

SCALE, SIZE = 0.41, 4
LIMIT = 1e-12
"""Relative 2-norm in float64."""

HEADS = ((8, 4), (8, 2), (8, 1))
MASKS: dict[str, dict[str, Any]] = {
    "whole": {"size": SIZE},
    "causal-window": {"size": SIZE, "causal": True, "window": 9},
    "narrow": {"size": SIZE, "window": 3},
}
LENGTHS = ((37,), (9, 20, 8))
ANCHORS = ((0, 2, 3, 11, 18, 19, 30, 36), (0, 8, 9, 12, 20, 28, 29, 30))
"""First and last positions of documents too, and more in some ranks' rows than in others'."""

LEAVES = ("q", "context_key", "context_value", "own_key", "own_value")


def cells(ranks: int) -> list[Cell]:
    made = []
    for ulysses, ring in ((2, 1), (1, 2), (2, 2), (4, 1), (1, 4)):
        if ulysses * ring != ranks:
            continue
        for exchange in ("gather", *(["ulysses"] if ring == 1 else []), *(["ring"] if ulysses == 1 else []), "usp"):
            how = {"ulysses": ulysses, "ring": ring, "exchange": exchange, "scale": SCALE}
            for heads in HEADS:
                for mask, given in MASKS.items() if heads == HEADS[0] else [("whole", MASKS["whole"])]:
                    balance = "contiguous" if mask == "narrow" else "zigzag"
                    name = f"{ulysses}x{ring}-{exchange}-{heads[0]}:{heads[1]}-{mask}"
                    kind = {"heads": heads, "mask": given, "balance": balance, "name": name}
                    made.append(how | kind)
    return made


def problem(heads: tuple[int, int]) -> Tensors:
    """[B, N, L, H, D] of all blocks, [B, T, K, D] of all positions."""
    generator = torch.Generator().manual_seed(sum(heads))
    rows, blocks = len(LENGTHS), len(ANCHORS[0])

    def draw(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, 8, dtype=torch.float64, generator=generator)

    first = [[start for length, start in documents(row) for _ in range(length)] for row in LENGTHS]
    own, keys = (blocks, SIZE, heads[1]), (sum(LENGTHS[0]), heads[1])
    return {
        "q": draw(blocks, SIZE, heads[0]),
        "dout": draw(blocks, SIZE, heads[0]),
        "own_key": draw(*own),
        "own_value": draw(*own),
        "context_key": draw(*keys),
        "context_value": draw(*keys),
        "anchor": torch.tensor(ANCHORS),
        "first": torch.tensor([[first[b][a] for a in row] for b, row in enumerate(ANCHORS)]),
    }


def documents(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(length, first position) of each."""
    return [(length, sum(lengths[:place])) for place, length in enumerate(lengths)]


def alone(whole: Tensors, block: BlockMask) -> Tensors:
    """One process's output and gradients."""
    device = load_device("cpu").attention
    mask = block.context(whole["anchor"], whole["first"])
    form = BlockForm(context=device, own=device, mask=mask, block=block, scale=SCALE)
    leaves = {name: whole[name].clone().requires_grad_() for name in LEAVES}
    context = leaves["context_key"], leaves["context_value"]
    own = leaves["own_key"].flatten(1, 2), leaves["own_value"].flatten(1, 2)
    out = block_attention(form, leaves["q"].flatten(1, 2), context, own)
    out.backward(whole["dout"].flatten(1, 2))
    grads = {f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach().view(whole["q"].shape), **grads}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the problems, and what each rank made of each cell."""
    directory = tmp_path_factory.mktemp("blocks")
    for heads in HEADS:
        save_file(problem(heads), directory / f"problem-{heads[0]}-{heads[1]}.safetensors")
    for ranks in (2, 4):
        chosen = directory / f"cells-{ranks}.json"
        chosen.write_text(json.dumps(cells(ranks)))
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        command = [sys.executable, str(WORKER), str(chosen), str(directory), str(ranks), str(store.port)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stderr
    return directory


def together(cell: Cell, found: list[Tensors], like: Tensors) -> Tensors:
    """The ranks' results as one process has them; each block is one rank's."""
    layout = Layout(length=sum(LENGTHS[0]), ulysses=cell["ulysses"], ring=cell["ring"], balance=cell["balance"])
    whole = {}
    for name, expected in like.items():
        if "context" in name:
            padded = layout.whole([rank[name] for rank in found])
            assert not padded[:, layout.length :].any()
            whole[name] = padded[:, : layout.length]
            continue
        whole[name] = torch.full_like(expected, torch.nan)
        for rank in found:
            row, place = (~rank["filler"]).nonzero(as_tuple=True)
            number = rank["index"][row, place]
            assert whole[name][row, number].isnan().all()
            whole[name][row, number] = rank[name][row, place]
    return whole


@pytest.mark.parametrize("cell", [*cells(2), *cells(4)], ids=lambda cell: cell["name"])
def test_outputs_and_every_gradient_are_one_processes(folder: Path, cell: Cell) -> None:
    ranks = range(cell["ulysses"] * cell["ring"])
    found = [load_file(folder / f"{cell['name']}-{rank}.safetensors") for rank in ranks]
    assert any(bool(rank["filler"].any()) for rank in found)
    expected = alone(problem(cell["heads"]), BlockMask(**cell["mask"]))
    assert len(expected) == 1 + len(LEAVES)
    got = together(cell, found, expected)
    for name, value in expected.items():
        apart = float((got[name] - value).norm() / value.norm())
        assert apart <= LIMIT, (name, apart)
