"""The terms in which a rank's memory is planned: moments of a step, parts of memory, and what decides them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from torchspec.core.interfaces.algorithm import Algorithm, StepMemory
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.parallel.sequence import Exchange

Moment = Literal["capture", "loss", "backward", "reduction", "optimizer"]
MOMENTS: tuple[Moment, ...] = ("capture", "loss", "backward", "reduction", "optimizer")

LARGE_BLOCK = 32 << 20
"""glibc's malloc gives blocks from this size on back to the system when they are freed (its greatest threshold)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one rank, how they come about, and when they are there.

    returned    of the bytes, those in blocks so large that malloc gives them back when they are freed
    """

    name: str
    bytes: int
    how: str
    moments: tuple[Moment, ...] = MOMENTS
    returned: int = 0


def part_of(name: str, tensors: Iterable[int], how: str, moments: tuple[Moment, ...] = MOMENTS) -> Part:
    """A part made of tensors of these bytes."""
    sizes = list(tensors)
    large = sum(size for size in sizes if size >= LARGE_BLOCK)
    return Part(name=name, bytes=sum(sizes), how=how, moments=moments, returned=large)


@dataclass(frozen=True, kw_only=True)
class Models:
    """Target and draft as far as memory goes.

    draft         shapes of the trained tensors
    target        shapes of the stored tensors; none where its engine runs in a process of its own
    kept          bytes of the same tensors, where they stay quantised as they are stored
    mapped        the target runs in the precision of its files, so that on a CPU their pages are its memory
    fp8           elements of the weights that a run in FP8 multiplies by in it, a frozen output head's among them
    fp8_gathered  of these, those of weights that ranks may gather in it
    fp8_head      and of the draft's own head, which they may not where each multiplies by a part
    process       resident bytes of a process with everything imported; None on an accelerator, whose allocator counts
    """

    algorithm: Algorithm
    spec: TargetSpec
    draft: tuple[tuple[int, ...], ...]
    target: tuple[tuple[int, ...], ...]
    mapped: bool
    process: int | None
    fp8: int = 0
    fp8_gathered: int = 0
    fp8_head: int = 0
    kept: tuple[int, ...] = ()

    @property
    def trained(self) -> int:
        return sum(map(prod, self.draft))

    @property
    def head(self) -> int:
        """Elements of the draft's output head."""
        return max((prod(shape) for shape in self.draft if shape[0] == self.algorithm.vocabulary_size), default=0)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What decides a rank's memory beside the models. `compute` is the draft's precision, `target_dtype` the target's.

    rows        positions of a micro-batch on this rank, at most
    text        tokens of the longest text
    captured    positions that this rank runs the target over at a time
    several     a step has more than one micro-batch
    memory      with `loss_bytes` given
    fp8         linear maps are computed in FP8
    fp8_gather  and their weights gathered in it
    held        bytes of keys, values and their gradients of other ranks, in this exchange
    tensor_parallel, head_ranks    how many ranks hold the target, and its head, together
    """

    ranks: int
    rows: int
    text: int
    captured: int
    several: bool
    compute: torch.dtype
    target_dtype: torch.dtype
    memory: StepMemory
    exchange: Exchange = "gather"
    held: int = 0
    tensor_parallel: int = 1
    head_ranks: int = 1
    fp8: bool = False
    fp8_gather: bool = False
    offload: Literal["none", "activations", "states", "all"] = "none"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
