"""What worker scripts share: ranks as forks of one process, which has imported everything once.

A script takes it by `runpy.run_path(...)`: scripts have no package, and no folder of theirs on the path.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from torchspec.core import registry
from torchspec.core.parallel import mesh
from torchspec.core.settings import Launch


def run_ranks(main: Callable[..., object], jobs: Iterable[Sequence[Any]]) -> int:
    """`main(*job)` of every job in a fork of its own, all at once -> 1 if one failed, else 0; all are waited for."""
    children = [_fork(main, job) for job in jobs]
    ended = [os.waitpid(child, 0)[1] for child in children]
    return int(any(ended))


def _fork(main: Callable[..., object], job: Sequence[Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        main(*job)
        code = 0
    except BaseException:  # noqa: BLE001 - the fork must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Meshes:
    """Of ranks that meet at a port over gloo: a context for each ulysses x ring, made when it is first asked for."""

    def __init__(self, rank: int, ranks: int, port: int, deadline: timedelta) -> None:
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=False, timeout=deadline)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=deadline)
        self._launch, self._deadline = Launch(rank=rank, local_rank=rank, world_size=ranks), deadline
        self._made: dict[tuple[int, int], mesh.ParallelContext] = {}

    def context(self, ulysses: int, ring: int) -> mesh.ParallelContext:
        if (ulysses, ring) not in self._made:
            device = registry.load_device("cpu")
            made = mesh.start(device, self._launch, self._deadline, ulysses=ulysses, ring=ring)
            for group in (made.sequence.get_group(), made.mesh.get_group("ring")):
                assert group._get_backend(torch.device("cpu")).options._timeout == self._deadline
            self._made[ulysses, ring] = made
        return self._made[ulysses, ring]
