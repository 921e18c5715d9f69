"""Each rank's random state: seeded, set apart for a side computation, stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torchspec.core.interfaces.device import Runtime


def seed_rank(runtime: Runtime, seed: int, step: int, rank: int) -> None:
    """Random states of one rank from one step on; ranks and steps differ."""
    mixed = rank_seed(seed, step, rank)
    torch.manual_seed(mixed)
    runtime.manual_seed(mixed)


def rank_seed(seed: int, step: int, rank: int) -> int:
    """See `seed_rank`."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63


def draw_of(seed: int, epoch: int, sample_id: str) -> int:
    """See `Moment.draws`."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def capture_state(runtime: Runtime) -> dict[str, Tensor]:
    """The CPU's and the device's generator, uint8."""
    return {"cpu": torch.get_rng_state(), "device": runtime.rng_state()}


def restore_state(runtime: Runtime, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    runtime.set_rng_state(state["device"])


@contextmanager
def untouched(runtime: Runtime) -> Iterator[None]:
    """Whatever is drawn inside, training afterwards draws what it would have drawn."""
    state = capture_state(runtime)
    try:
        yield
    finally:
        restore_state(runtime, state)
