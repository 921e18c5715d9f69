"""One rank of test_collectives.py: run by torchrun, or alone; prints what it proved and exits non-zero on a failure."""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from torchspec.core.errors import TorchspecError
from torchspec.core.registry import load_device

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)


def payload(sender: int, receiver: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(6, dtype=torch.float64).view(2, 3).add(100 * sender + 10 * receiver).to(dtype)


def all_to_all(group: ProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    for dtype in DTYPES:
        parts = [payload(rank, r, dtype).to(device) for r in range(size)]
        parts[0] = parts[0].mT.contiguous().mT  # contiguity is the adapter's business
        received = communication.all_to_all(parts, group)
        assert len(received) == size
        for sender, tensor in enumerate(received):
            assert torch.equal(tensor.cpu(), payload(sender, rank, dtype)), (rank, sender, dtype)
            assert tensor.is_contiguous()


def uneven_all_to_all(group: ProcessGroup) -> None:
    """Rank s sends r + 2 s rows to rank r; some send none."""
    rank, size = group.rank(), group.size()
    for dtype in DTYPES:
        parts = [payload(rank, r, dtype).repeat(3, 1)[: (r + 2 * rank) % 5].to(device) for r in range(size)]
        rows = [(rank + 2 * sender) % 5 for sender in range(size)]
        received = communication.all_to_all(parts, group, rows)
        for sender, tensor in enumerate(received):
            assert torch.equal(tensor.cpu(), payload(sender, rank, dtype).repeat(3, 1)[: rows[sender]])


def gathers_and_sums(group: ProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    for dtype in DTYPES:
        mine = payload(rank, 0, dtype).to(device)
        gathered = communication.all_gather(mine.mT.contiguous().mT, group)
        assert [t.tolist() for t in gathered] == [payload(r, 0, dtype).tolist() for r in range(size)]
        total = communication.reduce_scatter([payload(rank, r, dtype).to(device) for r in range(size)], group)
        assert torch.equal(total.cpu(), torch.stack([payload(s, rank, dtype) for s in range(size)]).sum(0))
        assert torch.equal(communication.all_reduce(mine, group).cpu(), torch.stack([t.cpu() for t in gathered]).sum(0))
        assert torch.equal(mine.cpu(), payload(rank, 0, dtype))


def ring(group: ProcessGroup) -> None:
    """Keys and values go round together until each rank has seen all of them."""
    rank, size = group.rank(), group.size()
    for dtype in DTYPES:
        key, value = payload(rank, 0, dtype).to(device), payload(rank, 5, dtype).to(device).mT
        for step in range(1, size + 1):
            (next_key, wait_key), (next_value, wait_value) = (
                communication.ring_exchange(key, group),
                communication.ring_exchange(value, group),
            )
            overlapped = (key.double() @ key.double().mT).sum()  # work while the exchange is under way
            wait_value()
            wait_key()
            assert overlapped.isfinite()
            origin = (rank - step) % size
            assert torch.equal(next_key.cpu(), payload(origin, 0, dtype)), (rank, step, dtype)
            assert torch.equal(next_value.cpu(), payload(origin, 5, dtype).mT), (rank, step, dtype)
            key, value = next_key, next_value


def subgroups() -> None:
    """Groups in another order than global ranks, and a group that leaves a rank out."""
    rank, size = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group(sorted({0, size - 1}))
    if rank in (0, size - 1):
        all_to_all(pair)
        uneven_all_to_all(pair)
        gathers_and_sums(pair)
        ring(pair)
    alone = [dist.new_group([r]) for r in range(size)]
    all_to_all(alone[rank])
    gathers_and_sums(alone[rank])
    ring(alone[rank])


def exchanges() -> None:
    communication.init(device, timedelta(seconds=120))
    communication.init(device, timedelta(seconds=120))  # a world that exists already is used
    world = dist.group.WORLD
    assert world is not None
    all_to_all(world)
    uneven_all_to_all(world)
    gathers_and_sums(world)
    ring(world)
    subgroups()
    silent_peer()
    dist.barrier()
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} ok")
    dist.destroy_process_group()


def silent_peer() -> None:
    """The others never answer rank 0: its wait ends with an error within the group's deadline."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() != 0 or dist.get_world_size() == 1:
        return
    started = time.monotonic()
    try:
        communication.ring_exchange(torch.ones(4, device=device), group)[1]()
    except RuntimeError:
        assert 1 < time.monotonic() - started < 30
    else:
        raise AssertionError("a message came from a rank that sent none")


def refusals() -> None:
    """Worlds that cannot be: each an error for people."""
    os.environ.update(RANK="0", WORLD_SIZE="2")
    refused()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    refused()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    refused()


def refused() -> None:
    try:
        communication.init(device, timedelta(seconds=2))
    except TorchspecError as error:
        print(error)


if __name__ == "__main__":
    adapter = load_device(sys.argv[1])
    communication, device = adapter.communication, adapter.runtime.bind(0)
    {"exchanges": exchanges, "refusals": refusals}[sys.argv[2]]()
