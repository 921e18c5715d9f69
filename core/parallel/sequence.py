"""The ranks that share a sequence, and what they send each other: always whole groups, always given explicitly.

Every function here is a collective over the named group. The differentiable ones are their own transpose's transpose:
what forward gathers, backward sums back to its owner.

Shape letters: B batch, T positions of the padded sequence, S rows that a rank owns, H heads, D head size, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from torchspec.core.interfaces.device import Communication
from torchspec.core.ops.once import once_differentiable
from torchspec.core.parallel.shards import Layout

Exchange = Literal["gather", "ulysses", "ring", "usp"]


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """One rank's place among those that share a sequence.

    group      all P = U x R of them, in rank order r = ring index x U + Ulysses index
    ulysses    the U ranks of the same ring index
    ring       the R ranks of the same Ulysses index
    slab       what each of them owns of a sequence is a multiple of so many rows
    exchange   how step-0 keys and values meet the queries (`core.attention.forms`)
    """

    communication: Communication
    group: ProcessGroup
    ulysses: ProcessGroup
    ring: ProcessGroup
    exchange: Exchange = "gather"
    slab: int = 1

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def layout(self, length: int, alignment: int = 1) -> Layout:
        return Layout(
            length=length,
            ulysses=self.ulysses.size(),
            ring=self.ring.size(),
            alignment=alignment,
            slab=self.slab,
        )

    @property
    def peers(self) -> range:
        """The ranks of `group` whose queries are attended to together with this one's."""
        width = self.ulysses.size() if self.exchange in ("ulysses", "usp") else 1
        first = self.rank - self.rank % width
        return range(first, first + width)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the sequence's ranks; `tensor` is not changed."""
        return self.communication.all_reduce(tensor, self.group)


def gather_sequence(x_BS: Tensor, layout: Layout, sequence: SequenceGroup | None, *, unpad: bool = True) -> Tensor:
    """Rows [B, S, ...] of every rank as the whole sequence, [B, T, ...], on every rank; differentiable once.

    The padding at the end is taken off: T is the layout's length, or its padded length if not `unpad`. The gradient
    of a rank's rows is the sum of what all ranks do with them. Without a group there is one rank, and x is the whole.
    """
    whole: Tensor = x_BS
    if sequence is not None and sequence.size > 1:
        whole = _Gather.apply(x_BS, layout, sequence)  # type: ignore[no-untyped-call]
    return whole[:, : layout.length] if unpad else whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, layout: Layout, sequence: SequenceGroup) -> Tensor:
        ctx.layout, ctx.sequence = layout, sequence
        return layout.whole(sequence.communication.all_gather(x_BS.contiguous(), sequence.group))

    @staticmethod
    @once_differentiable("the gathering of rows")
    def backward(ctx: Any, dwhole_BT: Tensor) -> tuple[Tensor, None, None]:
        parts = [part.to(_wide(part.dtype)) for part in ctx.layout.split(dwhole_BT)]
        dx_BS = ctx.sequence.communication.reduce_scatter(parts, ctx.sequence.group)
        return dx_BS.to(dwhole_BT.dtype), None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
