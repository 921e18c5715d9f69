"""The draft over all ranks: fp32 parameters sharded, compute in the configured precision, every reduction a sum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from torchspec.core.interfaces.device import Device
from torchspec.core.training.fp8 import Gathering
from torchspec.core.training.fp8_gather import gather_in_fp8

COMPUTE = {"float32": None, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}
"""What the draft's parameters are cast to; in FP8 its linear maps go on from there (`training.fp8`)."""


class Meshed(Protocol):
    """Ranks over which a draft is sharded; `parallel.mesh.ParallelContext` is one."""

    @property
    def device(self) -> Device: ...
    @property
    def torch_device(self) -> torch.device: ...
    @property
    def every(self) -> DeviceMesh: ...


def shard_draft(
    draft: nn.Module,
    context: Meshed,
    compute: str,
    *,
    states_on_host: bool = False,
    gather: Gathering | None = None,
) -> nn.Module:
    """Shard in place and return the same module; every rank must hold the same initial values.

    One FSDP unit: a draft is a few layers that the unroll calls again and again, so its parameters are gathered once
    per micro-batch. Inputs are not cast: weights, masks and rotary tables that pass through `draft(...)` keep their
    precision, and the draft casts what it multiplies. Gradients are summed over ranks, never averaged: the trainer
    divides by one global denominator. With `states_on_host` the shards, their gradients and so the optimizer's state
    stay in the host's memory, and come to the device for a micro-batch. `gather`: weights that are multiplied by in FP8
    are gathered in it (`training.fp8_gather`).
    """
    draft.to(context.torch_device)
    param_dtype = COMPUTE[compute]
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=None if param_dtype is None else torch.float32,
        cast_forward_inputs=False,
    )
    pinned = context.torch_device.type != "cpu"
    offload = CPUOffloadPolicy(pin_memory=pinned) if states_on_host else OffloadPolicy()
    sharded = fully_shard(draft, mesh=context.every, mp_policy=policy, offload_policy=offload)
    # gloo has no averaging reduction; with factor 1 and forced sums FSDP issues plain SUMs on every backend.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    if gather is not None:
        assert param_dtype is not None, "weights in FP8 stand for matrices in bf16"
        names, temporary_bytes = gather.weights(draft), context.device.ops.temporary_bytes
        gather_in_fp8(draft, names, gather.scaling, param_dtype, context.torch_device, temporary_bytes)
    return draft


@contextmanager
def cast_alone(draft: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """A forward and a backward pass of a draft that is not sharded, with parameters in `dtype`: the same numbers as
    FSDP's mixed precision over one rank.

    Inside, the draft's parameters are copies. Their gradients, which autograd adds up in `dtype` over one pass, are
    added to those of the parameters in these' own precision.
    """
    if dtype is None:
        yield
        return
    kept = dict(draft.named_parameters())  # a shared one once
    copies = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad) for p in kept.values()}
    places = [
        (module, name, parameter)
        for module in draft.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    for module, name, parameter in places:
        module._parameters[name] = copies[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
    for parameter in kept.values():
        grad = copies[id(parameter)].grad
        if grad is not None:
            wide = grad.to(parameter.dtype)
            parameter.grad = wide if parameter.grad is None else parameter.grad.add_(wide)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor is itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unsharded_state(draft: nn.Module) -> dict[str, Tensor]:
    """The whole state on every rank's CPU, detached copies; a collective over all ranks."""
    state: dict[str, Tensor] = {}
    for name, tensor in draft.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        state[name] = whole.detach().to("cpu", copy=True)
    return state
