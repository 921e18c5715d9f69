"""The loaded device: its parts, and what PyTorch has to be told of them once a process."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.backend_registration import rename_privateuse1_backend

from torchspec.devices.api import Device
from torchspec.devices.parts import MathKernel, TiledAttention, TorchCommunication, TorchRuntime
from toyhw import _C
from toyhw.sharing import ToySharedMemory


@cache
def device() -> Device:
    _introduce()
    return Device(
        name="toyhw",
        runtime=TorchRuntime("toyhw", visible_devices_variable="TOYHW_VISIBLE_DEVICES"),
        communication=TorchCommunication("cpu:gloo,toyhw:tccl"),
        attention=TiledAttention(MathKernel(), temporary_bytes=2 << 20),
        shared_memory=ToySharedMemory(),
    )


def _introduce() -> None:
    """Name the device, its module (`torch.toyhw`) and its collectives to PyTorch."""
    rename_privateuse1_backend("toyhw")
    from toyhw import module

    torch._register_device_module("toyhw", module)  # type: ignore[no-untyped-call]
    dist.Backend.register_backend("tccl", _tccl, extended_api=True, devices=["toyhw"])


def _tccl(options: Any, _: object) -> Any:
    gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
    return _C.over_gloo(gloo)
