"""Gathers of a few sharded matrices in FP8; `worker.py` loads this file.

A stage is a gather: fresh weights, the same once more, those after an update that doubles and more, those of a loaded
state, and those with a NaN and an infinity in other ranks' rows. Rank 0 writes the masters of every stage, what the
module saw of them, and what was sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from torchspec.core.ops.fp8_weight import Fp8Weight
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training import fp8_gather
from torchspec.core.training.sharding import shard_draft, unsharded_state

SHAPES = {"first": (48, 32), "second": (32, 64), "third": (16, 16), "few": (2, 16)}
"""Over 3 ranks 32 and 16 rows are not divided evenly, and of 2 rows the last has none."""
STAGES = ("fresh", "again", "updated", "loaded", "spoilt")
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name from torch 2.13 on, or the one before."""
SMALL = 3 * 32 * 4


class Matrices(nn.Module):
    """Of very different sizes, their rows too; one vector is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for place, (name, shape) in enumerate(SHAPES.items()):
            rows = torch.logspace(-6, 1, shape[0])[:, None] * 10.0 ** (2 * place)
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) * rows))
        self.bias = nn.Parameter(torch.zeros(7))
        self.seen: dict[str, Tensor] = {}

    def forward(self) -> Tensor:
        total = self.bias.float().sum()
        for name in SHAPES:
            weight = getattr(self, name)
            total = total + 3 * weight.float().sum()
            if isinstance(weight, Fp8Weight):
                self.seen |= {
                    f"{name}.values": weight.e4m3.view(torch.uint8).clone(),
                    f"{name}.scale": weight.scale.clone(),
                }
        return total


class Counted:
    """FSDP's all-gather, and the bytes that a rank gives to it."""

    def __init__(self) -> None:
        self.bytes = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self.bytes += input_tensor.nbytes
        assert input_tensor.dtype in (torch.uint8, torch.bfloat16), "what every backend sends"
        return ALL_GATHER(output_tensor, input_tensor, group=group, async_op=async_op)


def run(cell: dict[str, Any], context: ParallelContext, results: Path) -> None:
    module = Matrices()
    shard_draft(module, context, "bfloat16", states_on_host=cell.get("offload", False))
    if cell["gather"]:
        fp8_gather.gather_in_fp8(module, list(SHAPES), cell["scaling"], torch.bfloat16, context.torch_device, SMALL)
    optimizer = torch.optim.AdamW(module.parameters(), lr=300.0)
    counted, reduced = Counted(), []
    module.set_custom_all_gather(counted)
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        reduced.append(tensor.nbytes)
        return reduce(tensor, *arguments, **named)

    tensors: dict[str, Tensor] = {}
    for stage in STAGES:
        if stage == "updated":
            optimizer.step()
        if stage == "loaded":
            module.load_state_dict({name: 0.01 * tensor for name, tensor in module.state_dict().items()})
        if stage == "spoilt":
            with torch.no_grad():
                for parameter, bad in ((module.first, torch.nan), (module.second, torch.inf)):
                    own = parameter.to_local()
                    if context.rank == context.world_size - 1:
                        own[-1, 3] = bad
        for parameter in module.parameters():
            assert isinstance(parameter, DTensor)
            assert type(parameter._local_tensor) is torch.Tensor
            assert parameter.dtype == torch.float32
        counted.bytes = 0
        reduced.clear()
        dist.all_reduce = counting
        module().backward()
        dist.all_reduce = reduce
        tensors |= {f"{stage}.master.{name}": tensor for name, tensor in unsharded_state(module).items()}
        tensors |= {f"{stage}.seen.{name}": tensor for name, tensor in module.seen.items()}
        tensors |= {f"{stage}.grad.{name}": p.grad.full_tensor().clone() for name, p in module.named_parameters()}
        tensors |= {f"{stage}.gathered": torch.tensor(counted.bytes), f"{stage}.reduced": torch.tensor(reduced or [0])}
        if stage == "fresh":
            optimizer.zero_grad()
    if context.is_main:
        save_file({name: t.contiguous() for name, t in tensors.items()}, results / f"{cell['name']}.safetensors")
