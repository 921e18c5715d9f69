"""Checks of `Communication`: each function by definition, between real ranks: four, or two where devices are few.

All checks run in the same processes, one after the other in the same order on every rank; every check communicates
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
from torchspec.devices.conformance.ranks import MANY, RANKS, needs_ranks, run_ranks
from torchspec.devices.conformance.subject import Subject, same, subject_of

SECONDS = 150
_DEADLINE = timedelta(seconds=40)
_SILENCE = timedelta(seconds=3)
_SLACK = 15.0


@cache
def _dtypes(subject: Subject) -> tuple[torch.dtype, ...]:
    return (*subject.dtypes, torch.int64, torch.int32)


def _sent(sender: int, receiver: int, dtype: torch.dtype, rows: int = 2) -> Tensor:
    """Numbers that halves hold exactly, sums of four too; different for every pair of ranks of the world."""
    return torch.arange(3 * rows).view(rows, 3).add(10 * sender + 3 * receiver).to(dtype)


def _members(group: ProcessGroup) -> list[int]:
    """Ranks of the world, in the group's order."""
    return [dist.get_global_rank(group, rank) for rank in range(group.size())]


def _all_to_all(subject: Subject, group: ProcessGroup) -> str:
    ranks, mine = _members(group), dist.get_rank()
    received = {}
    for dtype in _dtypes(subject):
        parts = [_sent(mine, r, dtype).to(subject.where) for r in ranks]
        parts[0] = parts[0].mT.contiguous().mT  # any layout
        received[dtype] = subject.device.communication.all_to_all(parts, group)
    for dtype, tensors in received.items():
        for sender, tensor in zip(ranks, tensors, strict=True):
            assert same(tensor, _sent(sender, mine, dtype)), f"of rank {sender}, {dtype}: other values"
            assert tensor.is_contiguous(), f"{dtype} comes in strides"
    return f"{len(received)} dtypes, {len(ranks)} ranks"


def _uneven_all_to_all(subject: Subject, group: ProcessGroup) -> str:
    """Rank s sends r + 2 s rows to rank r, modulo 4: some none."""
    ranks, mine = _members(group), dist.get_rank()
    rows = [(mine + 2 * sender) % 4 for sender in ranks]
    received = {}
    for dtype in subject.dtypes:
        parts = [_sent(mine, r, dtype, (r + 2 * mine) % 4).to(subject.where) for r in ranks]
        received[dtype] = subject.device.communication.all_to_all(parts, group, rows)
    for dtype, tensors in received.items():
        for sender, tensor, count in zip(ranks, tensors, rows, strict=True):
            assert same(tensor, _sent(sender, mine, dtype, count)), f"of rank {sender}, {dtype}: other values"
    return f"{len(received)} dtypes, parts of 0 to 3 rows"


def _gathers(subject: Subject, group: ProcessGroup) -> str:
    ranks, mine = _members(group), dist.get_rank()
    results = {}
    for dtype in _dtypes(subject):
        tensor = _sent(mine, 0, dtype).mT.contiguous().mT.to(subject.where)
        results[dtype] = subject.device.communication.all_gather(tensor, group)
    for dtype, gathered in results.items():
        right = len(gathered) == len(ranks) and all(map(same, gathered, (_sent(r, 0, dtype) for r in ranks)))
        assert right, f"{dtype}: not every rank's tensor in the order of ranks"
    return f"{len(results)} dtypes, {len(ranks)} ranks"


def _sums(subject: Subject, group: ProcessGroup) -> str:
    ranks, mine = _members(group), dist.get_rank()
    communication = subject.device.communication
    results = {}
    for dtype in _dtypes(subject):
        given = _sent(mine, 0, dtype).to(subject.where)
        kept = given.clone()
        parts = [_sent(mine, r, dtype).to(subject.where) for r in ranks]
        results[dtype] = (
            communication.all_reduce(given, group),
            communication.reduce_scatter(parts, group),
            given,
            kept,
        )
    for dtype, (total, scattered, given, kept) in results.items():
        none = torch.zeros(2, 3, dtype=dtype)
        wanted = sum((_sent(r, 0, dtype) for r in ranks), none)
        assert same(total, wanted), f"all_reduce of {dtype} is {total.tolist()}, not {wanted.tolist()}"
        assert torch.equal(given, kept), f"all_reduce changes its input ({dtype})"
        wanted = sum((_sent(r, mine, dtype) for r in ranks), none)
        assert same(scattered, wanted), f"reduce_scatter of {dtype}: not the sum of this rank's parts"
    return f"{len(results)} dtypes, {len(ranks)} ranks"


def _ring(subject: Subject, group: ProcessGroup) -> str:
    """Two tensors go round together, while the device works, until each rank has had all of them."""
    ranks, place = _members(group), group.rank()
    exchange = subject.device.communication.ring_exchange
    seen = []
    for dtype in subject.dtypes:
        key, value = _sent(ranks[place], 0, dtype).to(subject.where), _sent(ranks[place], 1, dtype).to(subject.where).mT
        for step in range(1, len(ranks) + 1):
            (next_key, wait_key), (next_value, wait_value) = exchange(key, group), exchange(value, group)
            product = torch.ones(100, 100, device=subject.where) @ torch.ones(100, 100, device=subject.where)
            wait_value()
            wait_key()
            key, value = next_key, next_value
            seen.append((ranks[(place - step) % len(ranks)], dtype, key.cpu(), value.cpu(), float(product[0, 0])))
    for origin, dtype, key, value, work in seen:
        assert same(key, _sent(origin, 0, dtype)), f"not what rank {origin} sent ({dtype}): wrong way or order"
        assert same(value, _sent(origin, 1, dtype).mT), f"the second tensor is not rank {origin}'s ({dtype})"
        assert work == 100.0, "work beside an exchange went wrong"
    direction = "" if len(ranks) > RANKS else "; of two ranks both ways are one"
    return f"{len(seen)} exchanges beside products{direction}"


def _groups(subject: Subject, group: ProcessGroup) -> str:
    """Groups of one, and pairs of every other rank, each of which must keep to itself."""
    size, mine = group.size(), dist.get_rank()
    alone = [dist.new_group([r]) for r in range(size)][mine]
    communication = subject.device.communication
    given = _sent(mine, 1, torch.float32).to(subject.where)
    buffer, wait = communication.ring_exchange(given, alone)
    wait()
    results = [
        buffer,
        *communication.all_to_all([given], alone),
        *communication.all_gather(given, alone),
        communication.reduce_scatter([given], alone),
        communication.all_reduce(given, alone),
    ]
    pairs = [dist.new_group([r, r + size // 2]) for r in range(size // 2)] if size > RANKS else []
    if pairs:
        for check in (_all_to_all, _uneven_all_to_all, _gathers, _sums, _ring):
            check(subject, pairs[mine % len(pairs)])
    assert all(torch.equal(result, given) for result in results), "a group of one gives other values"
    return f"five functions in groups of one{' and of every other rank' if pairs else '; no other group of two ranks'}"


def _silence(subject: Subject, group: ProcessGroup) -> str:
    """The others never answer rank 0: its wait ends with an error, or its process does, within the group's deadline,
    which is not the world's. Last: the group is lost afterwards."""
    lost = dist.new_group(timeout=_SILENCE)
    store = dist.distributed_c10d._get_default_store()
    if group.rank() != 0:
        until = time.monotonic() + _DEADLINE.total_seconds() + _SLACK
        while time.monotonic() < until and not store.check(["heard"]):
            time.sleep(0.1)  # silent, not gone
        return "silent"
    began = time.monotonic()
    try:
        buffer, wait = subject.device.communication.ring_exchange(torch.ones(4, device=subject.where), lost)
        wait()
        subject.device.runtime.synchronize()
        buffer.cpu()
    except Exception as error:  # any error will do  # noqa: BLE001
        seconds, told = time.monotonic() - began, type(error).__name__
    else:
        raise AssertionError("a message came from a rank that sent none")
    finally:
        store.set("heard", "")
    limit = _SILENCE.total_seconds()
    assert seconds < limit + _SLACK, f"the group's deadline is {limit:.0f} s, the error came after {seconds:.0f} s"
    return f"{told} after {seconds:.1f} s, deadline {limit:.0f} s"


_CHECKS: dict[str, Callable[[Subject, ProcessGroup], str]] = {
    "all to all": _all_to_all,
    "all to all, uneven": _uneven_all_to_all,
    "all gather": _gathers,
    "sums": _sums,
    "ring": _ring,
    "groups": _groups,
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
def _results(name: str, count: int) -> dict[str, list[Result] | str]:
    """Of each check, every rank's result, or why there are none. The ranks are started once."""
    with tempfile.TemporaryDirectory() as folder:
        ended = ""
        try:
            run_ranks(["torchspec.devices.conformance.collectives", name, folder], SECONDS, count)
        except AssertionError as error:
            ended = str(error)
        found: dict[str, list[Result] | str] = {}
        for check in _CHECKS:
            files = [Path(folder) / f"{check}.{rank}.json" for rank in range(count)]
            there = all(file.exists() for file in files)
            found[check] = [Result(**json.loads(file.read_text())) for file in files] if there else ended
        before = [found[check] for check in _CHECKS if check != _LAST]
        if ended.startswith("rank 0 of") and found[_LAST] == ended and ended not in before:
            # A backend that works by itself (NCCL) ends the process that waits in vain.
            ends = Result(check=_LAST, status="PASS", text=f"the waiting process was ended: {ended[:80]}", seconds=0.0)
            found[_LAST] = [ends] * count
        return found


def _check(name: str) -> Check[Subject]:
    def run(subject: Subject) -> str:
        needs_ranks(subject)
        found = _results(subject.spec.name, MANY if subject.can_hold_ranks(MANY) else RANKS)[name]
        assert not isinstance(found, str), found
        for rank, result in enumerate(found):
            assert result.status == "PASS", f"rank {rank}: {result.text}"
        return found[0].text

    return Check(f"collectives: {name}", run, seconds=SECONDS + 30)


COLLECTIVES = tuple(_check(name) for name in _CHECKS)

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
