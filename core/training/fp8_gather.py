"""Weights of a sharded draft gathered in e4m3: a byte an element where bf16 takes two.

FSDP asks a shard that has them what to send (`fsdp_pre_all_gather`) and what the draft is to see of what came
(`fsdp_post_all_gather`). Here a rank puts its rows of the fp32 masters into FP8 by the scales of the whole weight, and
the draft sees an `Fp8Weight`. Masters stay plain tensors: optimizers, checkpoints and the export know nothing of it.

Before each gather every rank measures its rows of all weights, and one all-reduce (MAX) of a number for each scale, 4
bytes for a row of a weight or for a weight, makes the scales those of the whole. Nothing is kept for the next gather,
so nothing can be stale after an update. What is gathered is, to the last bit, what `scaled` makes of the whole weight
in bf16; where there is an infinity or NaN, all that its scale belongs to is NaN in products, as it is there.

Shape letters: Z rows of a weight, H its columns, P the most rows that a rank has of it, N scales of all weights.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from torchspec.core.ops.fp8 import E4M3, Scaling, divided, largest, power_of_two
from torchspec.core.ops.fp8_weight import Fp8Weight


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sharded:
    """A weight: this rank's rows of it in fp32 [rows, H], and the places of its scales among all."""

    master: Tensor
    shape: torch.Size
    places: slice

    def rows(self, mesh: DeviceMesh) -> int:
        """P: as `torch.chunk` cuts, which FSDP does."""
        return math.ceil(self.shape[0] / mesh.size())


@dataclass(kw_only=True, eq=False)
class Fp8Gather:
    """`scale_N` on the computing device: the gathered weights read it, and every gather writes it anew."""

    scaling: Scaling
    dtype: torch.dtype
    temporary_bytes: int
    weights: Sequence[_Sharded]
    scale_N: Tensor
    _due: set[int] = field(default_factory=set)

    def attach(self, number: int, shard: Tensor) -> Tensor:
        """Make FSDP gather it in FP8. It looks for these two by name, on the tensor itself."""
        own = weakref.ref(shard)  # else a copy on the device would live until cycles are collected
        shard.fsdp_pre_all_gather = partial(self._before, number, own)  # type: ignore[attr-defined]
        shard.fsdp_post_all_gather = partial(self._after, number)  # type: ignore[attr-defined]
        return shard

    def attach_on_host(self, number: int, shard: Tensor) -> None:
        """A shard that waits in the host's memory: FSDP asks for it on the device, and then that copy what to send."""
        self.attach(number, shard)
        moved = partial(Tensor.to, shard)
        shard.to = lambda *args, **kwargs: self.attach(number, moved(*args, **kwargs))  # type: ignore[method-assign]

    def _before(
        self,
        number: int,
        own: weakref.ref[Tensor],
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor], None]:
        """-> this rank's rows in e4m3 as bytes [P, H], which every backend takes; nothing beside them."""
        if number not in self._due:  # the first of a gather: each weight is asked for once
            self._measure(mesh)
            self._due = set(range(len(self.weights)))
        self._due.discard(number)
        shard, weight, scale = own(), self.weights[number], self._scale(number)
        assert shard is not None
        rows = weight.rows(mesh)
        if self.scaling == "row":
            scale = scale[mesh.get_local_rank() * rows :][: len(shard)]
        values = divided(shard.to(self.dtype), scale, E4M3, self.temporary_bytes)
        sent = shard.new_zeros((rows, *weight.shape[1:]), dtype=torch.uint8)
        sent[: len(shard)] = values.view(torch.uint8)
        return (sent,), None

    def _after(
        self,
        number: int,
        all_gather_outputs: Sequence[Tensor],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[()]] | None:
        """-> the weight, over what came; FSDP gathers into the same memory every time, and calls with `out` then."""
        if out is not None:
            return None
        (came,) = all_gather_outputs
        values = came[: self.weights[number].shape[0]].view(E4M3)
        return Fp8Weight(values, self._scale(number), param_dtype), ()

    def _measure(self, mesh: DeviceMesh) -> None:
        """The scales of all weights, of what the masters are now. A collective."""
        found_N = torch.zeros_like(self.scale_N)
        for weight in self.weights:
            # Rounding is monotonous: the largest in bf16 is the largest, in bf16.
            most = largest(weight.master, self.scaling, self.temporary_bytes).to(self.dtype)
            first = weight.places.start + (mesh.get_local_rank() * weight.rows(mesh) if self.scaling == "row" else 0)
            found_N[first : first + len(most)] = most.flatten()
        # A maximum may lose a NaN on its way, not an infinity.
        dist.all_reduce(found_N.nan_to_num_(nan=torch.inf, posinf=torch.inf), dist.ReduceOp.MAX, group=mesh.get_group())
        self.scale_N.copy_(power_of_two(found_N, E4M3))

    def _scale(self, number: int) -> Tensor:
        return self.scale_N[self.weights[number].places, None]


def gather_in_fp8(
    draft: nn.Module,
    names: Sequence[str],
    scaling: Scaling,
    dtype: torch.dtype,
    device: torch.device,
    temporary_bytes: int,
) -> None:
    """Of a draft that `fully_shard` has sharded, computing in `dtype` on `device`, gather these weights in FP8.

    Nothing may give its parameters other tensors afterwards (`load_state_dict(assign=True)`, `draft.to(...)`).
    """
    parameters, weights, start = dict(draft.named_parameters()), [], 0
    for name in names:
        parameter: Any = parameters[name]
        assert isinstance(parameter, DTensor)
        stop = start + (parameter.shape[0] if scaling == "row" else 1)
        # `to_local` gives a view of it; FSDP looks at the tensor itself.
        weights.append(_Sharded(master=parameter._local_tensor, shape=parameter.shape, places=slice(start, stop)))
        start = stop
    gather = Fp8Gather(
        scaling=scaling,
        dtype=dtype,
        temporary_bytes=temporary_bytes,
        weights=weights,
        scale_N=torch.ones(start, device=device),
    )
    for number, weight in enumerate(weights):
        on_host = weight.master.device.type != device.type
        (gather.attach_on_host if on_host else gather.attach)(number, weight.master)
