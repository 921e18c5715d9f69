"""The device `npu_emulated`: the Ascend adapter's attention, operators and collectives on the CPU.

torch_npu's operators are emulated, HCCL is gloo behind guards that refuse what HCCL does not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulation
import torch
from torch import distributed as dist

from torchspec.devices.api import Availability, Device, DeviceSpec

WORD = torch.float32
SUMMED = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
MOVED = (*SUMMED, torch.uint8, torch.float64)
REDUCTIONS = (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT)

_entered = emulation.installed()


def load() -> Device:
    from torchspec.devices._tiled_attention import TiledAttention
    from torchspec.devices.ascend.attention import AscendKernel
    from torchspec.devices.ascend.communication import HcclCommunication
    from torchspec.devices.ascend.ops import AscendOps
    from torchspec.devices.cpu.runtime import CpuRuntime

    if not hasattr(torch.ops.npu, "npu_swiglu"):
        _entered.__enter__()  # for as long as the process lives
        guard()
    return Device(
        name="npu_emulated",
        runtime=CpuRuntime(),
        communication=HcclCommunication("gloo"),
        attention=TiledAttention(AscendKernel(), temporary_bytes=1 << 20),
        ops=AscendOps(),
    )


def guard() -> None:
    """Puts HCCL's limits before torch.distributed's functions, which then run over gloo."""
    from torchspec.devices import _collectives

    dist.all_to_all_single = guarded(dist.all_to_all_single, check_moved)
    dist.all_reduce = guarded(dist.all_reduce, check_reduced)
    _collectives._reduce_scatter = guarded(_collectives._reduce_scatter, check_reduced)


def guarded(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def check_moved(received: torch.Tensor, sent: torch.Tensor, *sizes: Any, group: Any = None) -> None:
    for tensor in (received, sent):
        refuse(tensor.dim() == 0, "all-to-all of a tensor without axes")
        whole_words = tensor.shape[1:].numel() * tensor.element_size() % WORD.itemsize == 0
        refuse(tensor.dtype != WORD and whole_words, f"all-to-all of {tensor.dtype}")
        refuse(tensor.dtype not in MOVED, f"all-to-all of {tensor.dtype}")


def check_reduced(tensor: torch.Tensor, *inputs: torch.Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> None:
    refuse(op not in REDUCTIONS, f"{op}")
    refuse(tensor.dtype not in SUMMED, f"a reduction of {tensor.dtype}")


def refuse(wrong: bool, what: str) -> None:
    if wrong:
        raise RuntimeError(f"HCCL does not take {what}")


SPEC = DeviceSpec(
    name="npu_emulated",
    device_type="cpu",
    probe=lambda: Availability(ok=True),
    load=load,
    capabilities=frozenset({"bf16", "fp16", "ranks_share_device"}),
)
