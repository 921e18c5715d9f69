"""The draft over all ranks: fp32 parameters sharded, compute in the configured precision, every reduction a sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from torchspec.core.parallel.mesh import ParallelContext

COMPUTE = {"float32": None, "bfloat16": torch.bfloat16}


def shard_draft(draft: nn.Module, context: ParallelContext, compute: str, *, states_on_host: bool = False) -> nn.Module:
    """Shard in place and return the same module; every rank must hold the same initial values.

    One FSDP unit: a draft is a few layers that the unroll calls again and again, so its parameters are gathered once
    per micro-batch. Inputs are not cast: weights, masks and rotary tables that pass through `draft(...)` keep their
    precision, and the draft casts what it multiplies. Gradients are summed over ranks, never averaged: the trainer
    divides by one global denominator. With `states_on_host` the shards, their gradients and so the optimizer's state
    stay in the host's memory, and come to the device for a micro-batch.
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
    return draft


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
