"""The ranks that a training step adds up over: none beside this one, or those of a process group that somebody made.

Nothing here creates a group or touches the default one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from torchspec.core.errors import PeerError
from torchspec.core.interfaces.device import Device


class Ranks(Protocol):
    """What a step asks of those that take part in it; `mesh.ParallelContext` is one."""

    @property
    def device(self) -> Device: ...
    @property
    def torch_device(self) -> torch.device: ...
    @property
    def data_rank(self) -> int: ...
    @property
    def sequence_rank(self) -> int: ...
    def add_up(self, tensor: Tensor) -> None:
        """In place, over all ranks."""
        ...

    def sum(self, values: Sequence[int]) -> list[int]: ...
    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class GivenRanks:
    """The ranks of `group`, which share no sequences: each computes micro-batches of its own. None: this process alone.

    `patience`: how long `meet` waits for the others; every other wait is bounded by the group's own timeout.
    """

    device: Device
    torch_device: torch.device
    group: ProcessGroup | None
    patience: timedelta
    sequence_rank: int = 0

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def data_rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def is_main(self) -> bool:
        return self.data_rank == 0

    @property
    def every(self) -> DeviceMesh:
        """The group as a mesh of one axis."""
        assert self.group is not None
        return DeviceMesh.from_group(self.group, self.torch_device.type)

    def add_up(self, tensor: Tensor) -> None:
        """See `Ranks`."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)

    def sum(self, values: Sequence[int]) -> list[int]:
        """Element-wise sums over the ranks."""
        total = torch.tensor(list(values), dtype=torch.int64, device=self._place)
        self.add_up(total)
        return [int(value) for value in total.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks`."""
        return self._gathered(value, None)

    def meet(self, value: Any, what: str) -> list[Any]:
        """As `gather`, where the others may not come: PeerError after `patience`, naming `what` they were to do."""
        try:
            return self._gathered(value, self.patience)
        except RuntimeError as error:
            raise PeerError(
                f"the other ranks of the group did not {what} within {self.patience.total_seconds():g} s, or one is "
                f"gone: every rank must call it as often as the others, whatever it holds ({error})"
            ) from error

    def _gathered(self, value: Any, patience: timedelta | None) -> list[Any]:
        payload = json.dumps(value).encode()
        if self.group is None:
            return [json.loads(payload)]
        lengths = self._collect(torch.tensor([len(payload)], dtype=torch.int64), patience)
        padded = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        parts = self._collect(padded, patience)
        return [json.loads(bytes(part[: int(n)].tolist())) for part, n in zip(parts, lengths, strict=True)]

    def _collect(self, mine: Tensor, patience: timedelta | None) -> list[Tensor]:
        mine = mine.to(self._place)
        parts = [torch.zeros_like(mine) for _ in range(self.size)]
        work = dist.all_gather(parts, mine, group=self.group, async_op=True)
        if work is not None:
            work.wait() if patience is None else work.wait(patience)
        return [part.cpu() for part in parts]

    @property
    def _place(self) -> torch.device:
        """Where the group takes what comes from the host."""
        if self.group is None:
            return torch.device("cpu")
        backends = dist.BackendConfig(dist.Backend(dist.get_backend_config(self.group))).get_device_backend_map()
        return torch.device("cpu") if "cpu" in backends else self.torch_device


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """A collective that broke as a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise PeerError(
            f"another rank is gone or no longer answers ({error}). The process group is not usable any more: make a "
            "new one, and a trainer that continues from the last `state_dict`"
        ) from error
