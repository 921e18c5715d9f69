"""This process's place among the ranks: the device mesh, the group for host data, and agreement on outcomes.

Gradients and sums travel over the mesh's axes with the device's own collectives. Flags, plans and JSON travel over
`control`, a gloo group on the CPU, so that agreeing never waits for the accelerator. Signs of life have a gloo group of
their own, since they are given while other work, which may communicate, goes on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from torchspec.core.errors import PeerError, TorchspecError
from torchspec.core.interfaces.device import Device
from torchspec.core.parallel.sequence import Exchange, SequenceGroup
from torchspec.core.settings import Launch

DEADLINE = timedelta(minutes=10)
"""No collective waits longer: a lost peer becomes an error, or, where a backend works by itself (NCCL), the end of the
process, which its launcher names."""

HEARTBEAT_SECONDS = 20.0
"""Between the signs of life of ranks that work or wait for one that does; well within the deadline."""

LETTING_GO_SECONDS = 0.2
"""Gloo's threads let go of the tensors of a collective a moment after its caller has gone on. One that is so late that
the interpreter is ending by then aborts the process (pytorch#179291, pytorch#190489), and nothing waits for it."""

DATA_AXIS, RING_AXIS, ULYSSES_AXIS = "dp", "ring", "ulysses"
EVERY_AXIS, SEQUENCE_AXIS, TENSOR_AXIS = "every", "sequence", "tensor"

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """`mesh` has the axes "dp", over which batches are divided, "ring" and "ulysses", which share a sequence.

    Of rank r the Ulysses index is r mod U, the ring index r div U mod R, the data index r div (U R). `every` is the
    mesh as one axis, over which parameters are sharded; `sequence` the two that share a sequence, as one. Along
    `tensor` neighbouring ranks, whole groups that share a sequence, hold one target together.
    `owns_world`: the process group was made by `start`.
    """

    device: Device
    torch_device: torch.device
    rank: int
    local_rank: int
    local_world_size: int
    world_size: int
    mesh: DeviceMesh
    every: DeviceMesh
    sequence: DeviceMesh
    tensor: DeviceMesh
    control: ProcessGroup
    pulse: ProcessGroup
    owns_world: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def every_group(self) -> ProcessGroup:
        return self.every.get_group()

    @property
    def data_rank(self) -> int:
        return self.mesh.get_local_rank(DATA_AXIS)

    @property
    def data_size(self) -> int:
        """How many micro-batches are computed at a time."""
        return self.mesh.size(0)

    @property
    def sequence_rank(self) -> int:
        return self.sequence.get_local_rank()

    @property
    def sequence_size(self) -> int:
        """How many ranks share a sequence."""
        return self.sequence.size()

    @property
    def tensor_rank(self) -> int:
        return self.tensor.get_local_rank()

    @property
    def target_index(self) -> int:
        """Which of the `targets` that there are this rank holds, or holds a part of."""
        return self.rank // self.tensor.size()

    @property
    def targets(self) -> int:
        return self.world_size // self.tensor.size()

    @property
    def captured_with(self) -> range:
        """The data indices whose micro-batches the ranks that hold this target run through it together."""
        width = max(1, self.tensor.size() // self.sequence_size)
        first = self.data_rank - self.data_rank % width
        return range(first, first + width)

    @property
    def logits_group(self) -> ProcessGroup:
        """Who shares a target's head: those that hold the target together, else that share a sequence, else all."""
        shared = next((m for m in (self.tensor, self.sequence) if m.size() > 1), self.every)
        return shared.get_group()

    def sequence_group(self, exchange: Exchange, slab: int = 1) -> SequenceGroup | None:
        """The ranks that share this one's sequences; None where it has its own. `slab`: see `SequenceGroup`."""
        if self.sequence_size == 1:
            return None
        return SequenceGroup(
            communication=self.device.communication,
            group=self.sequence.get_group(),
            ulysses=self.mesh.get_group(ULYSSES_AXIS),
            ring=self.mesh.get_group(RING_AXIS),
            exchange=exchange,
            slab=slab,
        )

    def add_up(self, tensor: Tensor) -> None:
        """In place, over all ranks, by the device's own collectives."""
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.every_group)

    def sum(self, values: Sequence[int]) -> list[int]:
        """Element-wise sums of host integers over all ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[int]) -> list[int]:
        """Element-wise maxima of host integers over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[int], op: dist.ReduceOp.RedOpType) -> list[int]:
        tensor = torch.tensor(list(values), dtype=torch.int64)
        dist.all_reduce(tensor, op=op, group=self.control)
        return [int(value) for value in tensor.tolist()]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank."""
        payload = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(payload)], dtype=torch.int64)
        dist.broadcast(size, src=0, group=self.control)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(data, src=0, group=self.control)
        return json.loads(bytes(data.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank."""
        payload = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(payload)], dtype=torch.int64), group=self.control)
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, mine, group=self.control)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def agree(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank; if it failed anywhere, fail everywhere, so that no rank waits for a lost one.

        It may take hours, on some ranks only (tokenising a corpus, decoding): while any is at it, all give signs of
        life. `work` must not itself agree on anything.
        """
        failure: BaseException | None = None
        with self._pulse():
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - re-raised below, after the peers know
                failure = error
        messages = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise PeerError(f"rank {rank} failed: {message}")
        return result

    def main_only(self, work: Callable[[], Result]) -> Result | None:
        """Run `work` on rank 0 while the others wait; its result there, None elsewhere; its failure everywhere."""
        return self.agree(lambda: work() if self.is_main else None)

    def main_first(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 and then, if it succeeded, on the others: what rank 0 leaves in a cache serves them."""
        mine = self.main_only(work)
        result = self.agree(lambda: mine if self.is_main else work())
        return cast(Result, result)

    @contextmanager
    def _pulse(self) -> Iterator[None]:
        """Leave the block when every rank has: no single wait for a peer is longer than a heartbeat.

        Raises PeerError when one no longer answers within the deadline.
        """
        if self.world_size == 1:
            yield
            return
        done = threading.Event()
        lost: list[RuntimeError] = []

        def beat() -> None:
            busy = torch.ones(1, dtype=torch.int64)
            while busy.item():
                done.wait(HEARTBEAT_SECONDS)
                busy.fill_(0 if done.is_set() else 1)
                try:
                    dist.all_reduce(busy, op=dist.ReduceOp.MAX, group=self.pulse)
                except RuntimeError as error:
                    lost.append(error)
                    return

        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield
        finally:
            done.set()
        heart.join()
        if lost:
            raise PeerError(f"another rank is gone or no longer answers; its own output says why ({lost[0]})")


@contextmanager
def lost_peers_named() -> Iterator[None]:
    """A collective that broke as a PeerError: torch raises it from wherever it happened, FSDP's own included."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise PeerError(
            f"another rank is gone or no longer answers; its own output, or its launcher, says why ({error}). "
            "The newest checkpoint counts: the same command continues from it"
        ) from error


def start(
    device: Device, launch: Launch, timeout: timedelta = DEADLINE, *, ulysses: int = 1, ring: int = 1, tensor: int = 1
) -> ParallelContext:
    """Bind this rank's device, then create the mesh, and the process group unless the program has one already.

    Raises TorchspecError where the ranks cannot be divided into groups of `ulysses` x `ring`, or of `tensor`.
    """
    owns_world = not dist.is_initialized()
    torch_device = device.runtime.bind(launch.local_rank)
    device.communication.init(torch_device, timeout)
    world = dist.get_world_size()
    if world % (ulysses * ring):
        raise TorchspecError(
            f"{world} ranks cannot be divided into groups of parallel.ulysses={ulysses} x parallel.ring={ring}"
        )
    if world % tensor or (tensor > 1 and tensor % (ulysses * ring)):
        raise TorchspecError(
            f"{world} ranks cannot be divided into groups of target.tensor_parallel={tensor} that hold whole groups of "
            f"parallel.ulysses={ulysses} x parallel.ring={ring}"
        )
    world_group = dist.group.WORLD
    assert world_group is not None
    # A world that is bound to a device asks every new group for a backend of it, though only the host talks here.
    host = "gloo" if world_group.bound_device_id is None else f"cpu:gloo,{torch_device.type}:gloo"
    shape = (world // (ulysses * ring), ring, ulysses)
    mesh = init_device_mesh(torch_device.type, shape, mesh_dim_names=(DATA_AXIS, RING_AXIS, ULYSSES_AXIS))
    context = ParallelContext(
        device=device,
        torch_device=torch_device,
        rank=dist.get_rank(),
        local_rank=launch.local_rank,
        local_world_size=launch.local_world_size,
        world_size=world,
        mesh=mesh,
        # No public name yet (torch 2.10 to 2.13), and what torchtitan builds its meshes with.
        every=mesh._flatten(EVERY_AXIS),
        sequence=mesh[RING_AXIS, ULYSSES_AXIS]._flatten(SEQUENCE_AXIS),
        tensor=init_device_mesh(torch_device.type, (world // tensor, tensor), mesh_dim_names=("copy", TENSOR_AXIS))[
            TENSOR_AXIS
        ],
        control=dist.new_group(backend=host, timeout=timeout),
        pulse=dist.new_group(backend=host, timeout=timeout),
        owns_world=owns_world,
    )
    for group in _own_groups(context):
        _set_pg_timeout(timeout, group)  # those of a mesh have PyTorch's default, which knows nothing of ours
    return context


def shutdown(context: ParallelContext) -> None:
    """Leave the groups that `start` created; a program's own world stays."""
    if context.owns_world:
        dist.destroy_process_group()
    else:
        for group in _own_groups(context):
            dist.destroy_process_group(group)
    if context.world_size > 1:
        time.sleep(LETTING_GO_SECONDS)


def _own_groups(context: ParallelContext) -> list[ProcessGroup]:
    """All but the world, once each."""
    meshes = [context.mesh[name] for name in (DATA_AXIS, RING_AXIS, ULYSSES_AXIS)]
    meshes += [context.every, context.sequence, context.tensor]
    groups = [*(axis.get_group() for axis in meshes), context.control, context.pulse]
    return list({id(group): group for group in groups if group is not dist.group.WORLD}.values())
