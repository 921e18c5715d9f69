"""Block attention of ranks that share sequences: `block_worker.py cells.json folder ranks port`.

The ranks are forks of one process; each runs every cell: it takes its rows of the context and the blocks whose anchors
lie among them, out of `folder/problem-<heads>.safetensors`, and writes what came of them.
"""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from torchspec.core import registry
from torchspec.core.attention.block import BlockForm, BlockMask, block_attention
from torchspec.core.attention.forms import attention_form
from torchspec.core.parallel import mesh
from torchspec.core.parallel.shards import Layout

forked = runpy.run_path(str(Path(__file__).parents[2] / "forked.py"))

Cell = dict[str, Any]
DEADLINE = timedelta(seconds=120)


def blocks_of(anchor_BN: Tensor, layout: Layout, rank: int, count: int) -> tuple[Tensor, Tensor]:
    """Which blocks a rank takes, [B, count], and which of these only fill the row: they repeat a block."""
    mine_BN = torch.isin(anchor_BN, layout.positions(rank))
    order_BN = torch.argsort(~mine_BN, dim=1, stable=True)
    return order_BN[:, :count], ~mine_BN.gather(1, order_BN)[:, :count]


def run(cell: Cell, folder: Path, context: mesh.ParallelContext) -> None:
    whole = load_file(folder / f"problem-{cell['heads'][0]}-{cell['heads'][1]}.safetensors")
    block = BlockMask(**cell["mask"])
    sequence = context.sequence_group(cell["exchange"])
    assert sequence is not None
    layout = replace(sequence.layout(whole["context_key"].shape[1]), balance=cell["balance"])
    anchor_BN, first_BN = whole["anchor"], whole["first"]
    owners = [torch.isin(anchor_BN, layout.positions(rank)) for rank in range(sequence.size)]
    count = max(int(mine_BN.sum(1).max()) for mine_BN in owners)  # the same on every rank
    anchors, firsts = [], []
    for peer in sequence.peers:
        index_BA, filler_BA = blocks_of(anchor_BN, layout, peer, count)
        first_BA = first_BN.gather(1, index_BA)
        firsts.append(first_BA)
        anchors.append(torch.where(filler_BA, first_BA, anchor_BN.gather(1, index_BA)))
    index_BA, filler_BA = blocks_of(anchor_BN, layout, sequence.rank, count)

    def slots(x_BNLHD: Tensor) -> Tensor:
        return x_BNLHD[torch.arange(len(x_BNLHD))[:, None], index_BA].flatten(1, 2)

    rows = {name: layout.cut(whole[name], sequence.rank).flatten(1, 2) for name in ("context_key", "context_value")}
    rows |= {name: slots(whole[name]) for name in ("q", "own_key", "own_value")}
    leaves = {name: x.requires_grad_() for name, x in rows.items()}
    device = registry.load_device("cpu").attention
    form = attention_form(device, layout, sequence)
    out = block_attention(
        BlockForm(
            context=form.attention,
            own=device,
            mask=block.context(torch.cat(anchors, dim=1), torch.cat(firsts, dim=1)),
            block=block,
            scale=cell["scale"],
        ),
        leaves["q"],
        form.spread(leaves["context_key"], leaves["context_value"]),
        (leaves["own_key"], leaves["own_value"]),
    )
    dout = slots(whole["dout"]).unflatten(1, (count, -1)).masked_fill(filler_BA[..., None, None, None], 0.0)
    out.backward(dout.flatten(1, 2))
    found = {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
    found |= {"out": out.detach(), "index": index_BA, "filler": filler_BA}
    for name in ("out", "grad.q", "grad.own_key", "grad.own_value"):
        found[name] = found[name].unflatten(1, (count, -1))
    save_file({n: x.contiguous() for n, x in found.items()}, folder / f"{cell['name']}-{sequence.rank}.safetensors")


def rank_main(cells: list[Cell], folder: Path, rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    meshes = forked["Meshes"](rank, ranks, port, DEADLINE)
    for cell in cells:
        run(cell, folder, meshes.context(cell["ulysses"], cell["ring"]))
    dist.destroy_process_group()


def main() -> int:
    cells, folder, ranks, port = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *map(int, sys.argv[3:])
    failed: int = forked["run_ranks"](rank_main, [(cells, folder, rank, ranks, port) for rank in range(ranks)])
    return failed


if __name__ == "__main__":
    sys.exit(main())
