"""What ranks that hold a target together tell each other in a forward pass: two sums per layer, and the vocabulary's.

Every rank ends up with the same whole hidden states and logits, bit for bit: a sum is formed once and handed around.

Shape letters: B sequences, T rows of each, H target hidden size, V vocabulary, v rows of it on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from transformers import PreTrainedModel

from torchspec.backends.hf.split_plan import SplitPlan, bounds

Hook = Callable[[nn.Module, Any, Tensor], Tensor]


def join_ranks(model: PreTrainedModel, plan: SplitPlan, mesh: DeviceMesh) -> None:
    """Make this rank's part of a target act as the whole; every rank must then run the same forward passes."""
    for name, module in model.named_modules():
        if plan.sums(name):
            module.register_forward_hook(_sum_over(mesh))
    vocabulary = plan.config.vocab_size
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    _join_embedding(embedding, vocabulary, mesh)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head.register_forward_hook(_gather_over(mesh, vocabulary))


def _sum_over(mesh: DeviceMesh) -> Hook:
    def hook(module: nn.Module, args: Any, partial_BTH: Tensor) -> Tensor:
        dist.all_reduce(partial_BTH, group=mesh.get_group())
        return partial_BTH

    return hook


def _join_embedding(embedding: nn.Embedding, vocabulary: int, mesh: DeviceMesh) -> None:
    """A token's row comes from the rank that has it; the others add zeros."""
    start, end = bounds(vocabulary, mesh.get_local_rank(), mesh.size())
    look_up = embedding.forward

    def forward(ids_BT: Tensor) -> Tensor:
        row_BT = ids_BT - start
        absent_BT1 = ((row_BT < 0) | (row_BT >= end - start))[..., None]
        rows_BTH = look_up(row_BT.clamp(0, end - start - 1)).masked_fill(absent_BT1, 0)
        dist.all_reduce(rows_BTH, group=mesh.get_group())
        return rows_BTH

    embedding.forward = forward  # type: ignore[method-assign, assignment]


def _gather_over(mesh: DeviceMesh, vocabulary: int) -> Hook:
    parts = [bounds(vocabulary, rank, mesh.size()) for rank in range(mesh.size())]
    counts = [end - start for start, end in parts]

    def hook(module: nn.Module, args: Any, logits_BTv: Tensor) -> Tensor:
        # A gather takes parts of one shape only.
        padded = F.pad(logits_BTv, (0, max(counts) - logits_BTv.shape[-1]))
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=mesh.get_group())
        return torch.cat([part[..., :count] for part, count in zip(gathered, counts, strict=True)], dim=-1)

    return hook
