"""Checks of `Communication`: each function by definition, between two real ranks.

All checks run in one pair of processes, one after the other in the same order on both ranks; every check communicates
first and compares afterwards, so that one that fails leaves the ranks in step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from torchspec.core.conformance.checks import Check, Result, perform
from torchspec.devices.api import launch
from torchspec.devices.conformance.ranks import RANKS, needs_ranks, run_ranks
from torchspec.devices.conformance.subject import Subject, same, subject_of

SECONDS = 150
_DEADLINE = timedelta(seconds=40)
_SILENCE = timedelta(seconds=3)


@cache
def _dtypes(subject: Subject) -> tuple[torch.dtype, ...]:
    return (*subject.dtypes, torch.int64, torch.int32)


def _sent(sender: int, receiver: int, dtype: torch.dtype, rows: int = 2) -> Tensor:
    """Numbers that halves hold exactly, different for every pair of ranks."""
    return torch.arange(3 * rows).view(rows, 3).add(50 * sender + 9 * receiver).to(dtype)


def _all_to_all(subject: Subject, group: ProcessGroup) -> str:
    rank, size = group.rank(), group.size()
    received = {}
    for dtype in _dtypes(subject):
        parts = [_sent(rank, r, dtype).to(subject.where) for r in range(size)]
        parts[0] = parts[0].mT.contiguous().mT  # any layout
        received[dtype] = subject.device.communication.all_to_all(parts, group)
    for dtype, tensors in received.items():
        for sender, tensor in enumerate(tensors):
            assert same(tensor, _sent(sender, rank, dtype)), f"of rank {sender}, {dtype}: other values"
            assert tensor.is_contiguous(), f"{dtype} comes in strides"
    return f"{len(received)} dtypes"


def _uneven_all_to_all(subject: Subject, group: ProcessGroup) -> str:
    """Rank s sends r + 2 s rows to rank r, modulo 4: some none."""
    rank, size = group.rank(), group.size()
    rows = [(rank + 2 * sender) % 4 for sender in range(size)]
    received = {}
    for dtype in subject.dtypes:
        parts = [_sent(rank, r, dtype, (r + 2 * rank) % 4).to(subject.where) for r in range(size)]
        received[dtype] = subject.device.communication.all_to_all(parts, group, rows)
    for dtype, tensors in received.items():
        for sender, tensor in enumerate(tensors):
            wanted = _sent(sender, rank, dtype, rows[sender])
            assert same(tensor, wanted), f"of rank {sender}, {dtype}: other values"
    return f"{len(received)} dtypes, parts of 0 to 3 rows"


def _gathers(subject: Subject, group: ProcessGroup) -> str:
    rank, size = group.rank(), group.size()
    results = {}
    for dtype in _dtypes(subject):
        mine = _sent(rank, 0, dtype).mT.contiguous().mT.to(subject.where)
        results[dtype] = subject.device.communication.all_gather(mine, group)
    for dtype, gathered in results.items():
        wanted = [_sent(r, 0, dtype).tolist() for r in range(size)]
        assert [t.tolist() for t in gathered] == wanted, f"{dtype}: not every rank's tensor in the order of ranks"
    return f"{len(results)} dtypes"


def _sums(subject: Subject, group: ProcessGroup) -> str:
    rank, size = group.rank(), group.size()
    communication = subject.device.communication
    results = {}
    for dtype in _dtypes(subject):
        mine = _sent(rank, 0, dtype).to(subject.where)
        kept = mine.clone()
        parts = [_sent(rank, r, dtype).to(subject.where) for r in range(size)]
        results[dtype] = (communication.all_reduce(mine, group), communication.reduce_scatter(parts, group), mine, kept)
    for dtype, (total, scattered, mine, kept) in results.items():
        wanted = sum((_sent(r, 0, dtype) for r in range(size)), torch.zeros(2, 3, dtype=dtype))
        assert same(total, wanted), f"all_reduce of {dtype} is {total.tolist()}, not {wanted.tolist()}"
        assert torch.equal(mine, kept), f"all_reduce changes its input ({dtype})"
        wanted = sum((_sent(r, rank, dtype) for r in range(size)), torch.zeros(2, 3, dtype=dtype))
        assert same(scattered, wanted), f"reduce_scatter of {dtype}: not the sum of this rank's parts"
    return f"{len(results)} dtypes"


def _ring(subject: Subject, group: ProcessGroup) -> str:
    """Two tensors go round together, while the device works, until each rank has had all of them."""
    rank, size = group.rank(), group.size()
    exchange = subject.device.communication.ring_exchange
    seen = []
    for dtype in subject.dtypes:
        key, value = _sent(rank, 0, dtype).to(subject.where), _sent(rank, 5, dtype).to(subject.where).mT
        for step in range(1, size + 1):
            (next_key, wait_key), (next_value, wait_value) = exchange(key, group), exchange(value, group)
            product = torch.ones(100, 100, device=subject.where) @ torch.ones(100, 100, device=subject.where)
            wait_value()
            wait_key()
            key, value = next_key, next_value
            seen.append(((rank - step) % size, dtype, key.cpu(), value.cpu(), float(product[0, 0])))
    for origin, dtype, key, value, work in seen:
        assert same(key, _sent(origin, 0, dtype)), f"not what rank {origin} sent ({dtype}): wrong way or order"
        assert same(value, _sent(origin, 5, dtype).mT), f"the second tensor is not rank {origin}'s ({dtype})"
        assert work == 100.0, "work beside an exchange went wrong"
    return f"{len(seen)} exchanges beside products"


def _groups(subject: Subject, group: ProcessGroup) -> str:
    """A group of one beside the world."""
    alone = [dist.new_group([r]) for r in range(group.size())][group.rank()]
    communication = subject.device.communication
    mine = _sent(group.rank(), 1, torch.float32).to(subject.where)
    buffer, wait = communication.ring_exchange(mine, alone)
    wait()
    results = [
        buffer,
        *communication.all_to_all([mine], alone),
        *communication.all_gather(mine, alone),
        communication.reduce_scatter([mine], alone),
        communication.all_reduce(mine, alone),
    ]
    assert all(torch.equal(result, mine) for result in results), "a group of one gives other values"
    return "five functions in a group of one"


def _silence(subject: Subject, group: ProcessGroup) -> str:
    """The others never answer rank 0: its wait ends with an error, or its process does, within the group's deadline.
    Last: the group is lost afterwards."""
    lost = dist.new_group(timeout=_SILENCE)
    if group.rank() != 0:
        time.sleep(_SILENCE.total_seconds() + 2)  # silent, not gone
        return "silent"
    began = time.monotonic()
    try:
        buffer, wait = subject.device.communication.ring_exchange(torch.ones(4, device=subject.where), lost)
        wait()
        subject.device.runtime.synchronize()
        buffer.cpu()
    except Exception as error:  # any error will do  # noqa: BLE001
        return f"{type(error).__name__} after {time.monotonic() - began:.1f} s"
    raise AssertionError("a message came from a rank that sent none")


_CHECKS: dict[str, Callable[[Subject, ProcessGroup], str]] = {
    "all to all": _all_to_all,
    "all to all, uneven": _uneven_all_to_all,
    "all gather": _gathers,
    "sums": _sums,
    "ring": _ring,
    "groups of one": _groups,
    "a silent peer": _silence,
}
_LAST = "a silent peer"


def main(name: str, folder: Path) -> None:
    """One rank: its results as JSON in `folder`, a file for each check."""
    subject = _bound(name)
    subject.device.communication.init(subject.where, _DEADLINE)
    group = dist.group.WORLD
    assert group is not None
    for check, run in _CHECKS.items():
        result = perform(_in_group(check, run, group), subject)
        (folder / f"{check}.{group.rank()}.json").write_text(json.dumps(asdict(result)))
    sys.stdout.flush()
    os._exit(0)  # a world with a lost group may wait in its destructor


def _in_group(name: str, run: Callable[[Subject, ProcessGroup], str], group: ProcessGroup) -> Check[Subject]:
    return Check(name, lambda subject: run(subject, group))


def _bound(name: str) -> Subject:
    subject = subject_of(name)
    return replace(subject, where=subject.device.runtime.bind(launch().local_rank))


@cache
def _results(name: str) -> dict[str, list[Result] | str]:
    """Of each check, both ranks' results, or why there are none. The ranks are started once."""
    with tempfile.TemporaryDirectory() as folder:
        ended = ""
        try:
            run_ranks(["torchspec.devices.conformance.collectives", name, folder], SECONDS)
        except AssertionError as error:
            ended = str(error)
        found: dict[str, list[Result] | str] = {}
        for check in _CHECKS:
            files = [Path(folder) / f"{check}.{rank}.json" for rank in range(RANKS)]
            there = all(file.exists() for file in files)
            found[check] = [Result(**json.loads(file.read_text())) for file in files] if there else ended
        before = [found[check] for check in _CHECKS if check != _LAST]
        if ended.startswith("rank 0 of") and found[_LAST] == ended and ended not in before:
            # A backend that works by itself (NCCL) ends the process that waits in vain.
            ends = Result(check=_LAST, status="PASS", text=f"the waiting process was ended: {ended[:80]}", seconds=0.0)
            found[_LAST] = [ends] * RANKS
        return found


def _check(name: str) -> Check[Subject]:
    def run(subject: Subject) -> str:
        needs_ranks(subject)
        found = _results(subject.spec.name)[name]
        assert not isinstance(found, str), found
        for rank, result in enumerate(found):
            assert result.status == "PASS", f"rank {rank}: {result.text}"
        return found[0].text

    return Check(f"collectives: {name}", run, seconds=SECONDS + 30)


COLLECTIVES = tuple(_check(name) for name in _CHECKS)

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
