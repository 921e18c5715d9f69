"""`Communication` over torch.distributed, for any collective backend it knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup

from torchspec.devices.api import TorchspecError, launch

# Renamed in torch 2.13, which warns of the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class TorchCommunication:
    """Collectives of one backend name, e.g. "gloo" or "cpu:gloo,cuda:nccl". Groups are always explicit.

    `splits`: the backend makes a group out of a larger one. The world is then bound to the device, so that meshes split
    it; in a bound world whose backend cannot, PyTorch refuses every mesh of more than one axis.
    """

    def __init__(self, backend: str, *, splits: bool = False) -> None:
        self.backend = backend
        self.splits = splits

    def init(self, device: torch.device, timeout: timedelta) -> None:
        """Create the world: torchrun's from its environment, else a world of one that needs no address or port.

        `timeout` bounds the rendezvous here and every later collective of the world. A world that exists already (the
        program is embedded in one) is used if it has these backends. Raises TorchspecError where ranks do not meet.
        """
        if dist.is_initialized():
            self._check_existing_world(device)
            return
        here = launch()
        bound = device if self.splits else None
        if here.world_size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(self.backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=bound)
            return
        try:
            dist.init_process_group(self.backend, init_method="env://", timeout=timeout, device_id=bound)
        except (dist.DistError, ValueError) as error:
            raise TorchspecError(
                f"rank {here.rank} of {here.world_size} could not join the others over {self.backend} within "
                f"{timeout.total_seconds():.0f} s: {error}\n    remedy: start the ranks with torchrun (it sets RANK, "
                f"WORLD_SIZE, MASTER_ADDR and MASTER_PORT) and look at the first rank that failed"
            ) from error

    def _check_existing_world(self, device: torch.device) -> None:
        existing = dist.get_backend_config()
        has, needs = (dist.BackendConfig(dist.Backend(x)).get_device_backend_map() for x in (existing, self.backend))
        for kind in {"cpu", device.type}:
            if has.get(kind) != needs[kind]:
                raise TorchspecError(
                    f"torch.distributed is already initialised with {existing!r}, but this device needs "
                    f"{needs[kind]!r} for tensors on {kind!r}\n    remedy: initialise it with {self.backend!r}, or "
                    f"leave it to torchspec"
                )

    def all_to_all(
        self, parts: Sequence[Tensor], group: ProcessGroup, rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Send parts[r] to group rank r and receive one from each; all alike but for the first axis.

        `rows[r]` is the length of the first axis of what rank r sends here; None: all parts have one shape.
        """
        assert len(parts) == group.size(), f"{len(parts)} parts for a group of {group.size()}"
        counts = [part.shape[0] for part in parts]
        expected = counts if rows is None else list(rows)
        sent = torch.cat(list(parts))
        received = sent.new_empty(sum(expected), *sent.shape[1:])
        if rows is None:
            assert len(set(counts)) == 1, f"parts of {counts} rows need `rows`"
            dist.all_to_all_single(received, sent, group=group)
        else:
            dist.all_to_all_single(received, sent, expected, counts, group=group)
        return list(torch.split(received, expected))

    def all_gather(self, tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
        """Every group rank's tensor, in rank order. Shapes and dtypes are equal on all ranks."""
        received = tensor.new_empty(group.size(), *tensor.shape)
        # Flat, into one buffer: lists are copied once more by some backends, and others take no shapes here.
        _all_gather(received.view(-1), tensor.contiguous().view(-1), group=group)
        return list(received.unbind(0))

    def reduce_scatter(self, parts: Sequence[Tensor], group: ProcessGroup) -> Tensor:
        """The sum over the group's ranks of their parts[r], where r is this rank. One shape and dtype."""
        mine = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        _reduce_scatter(mine.view(-1), torch.cat([part.reshape(-1) for part in parts]), group=group)
        return mine

    def all_reduce(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """The sum over the group's ranks, on each of them; `tensor` is not changed."""
        total = tensor.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        return total

    def ring_exchange(self, tensor: Tensor, group: ProcessGroup) -> tuple[Tensor, Callable[[], None]]:
        """Start sending to the next group rank and receiving from the previous: (buffer, wait).

        Neither `tensor` nor the buffer may be touched before `wait` has returned. Several exchanges may be under way
        if every rank starts them in the same order. Shapes and dtypes are equal on all ranks.
        """
        rank, size = group.rank(), group.size()
        sent = tensor.contiguous()
        received = torch.empty_like(sent)
        if size == 1:
            received.copy_(sent)
            return received, lambda: None
        works = dist.batch_isend_irecv(
            [
                P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % size),
                P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
            ]
        )

        def wait() -> None:
            for work in works:
                work.wait()
            works.clear()

        return received, wait
