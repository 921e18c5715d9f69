"""Ulysses attention (2309.14509) as an `Attention`: each rank attends with some of the heads, for all of the rows.

Keys and values change from rows to heads once per micro-batch (`spread_heads`), queries at every call, and outputs come
back together with their log-sum-exps, so that whoever merges them with local keys can. Rotation has taken place
before: no rank has to know the positions of others' rows.

Shape letters: B batch, Q queries of a rank, S rows of a rank, T = U S rows of the group, U ranks of the group,
H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.core.interfaces.device import Attention
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.once import once_differentiable
from torchspec.core.parallel.sequence import SequenceGroup
from torchspec.core.parallel.shards import Layout


def heads_fit(query_heads: int, key_heads: int, ranks: int) -> bool:
    """Whether `ranks` can share the heads: query heads evenly, key heads evenly or each by the same number of ranks."""
    return query_heads % ranks == 0 and (key_heads % ranks == 0 or ranks % key_heads == 0)


def key_heads_of(rank: int, key_heads: int, ranks: int) -> slice:
    """The key heads that the query heads of a rank read; several ranks read the same one where there are fewer."""
    first = rank * key_heads // ranks
    return slice(first, first + max(1, key_heads // ranks))


@dataclass(frozen=True, kw_only=True)
class UlyssesAttention:
    """Implements `Attention`: queries [B, Q, H, D] of this rank, keys as `spread_heads` left them.

    `mask` is of the queries of all ranks of the group, U Q of them in rank order. `attention` is given heads.
    """

    attention: Attention
    sequence: SequenceGroup

    @property
    def temporary_bytes(self) -> int:
        return self.attention.temporary_bytes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = self.attention.forward(self._to_heads(q), k, v, mask, scale)
        return self._to_rows(out), self._lse_to_rows(lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: MaskSpec, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._to_heads(torch.cat((q, dout, out), dim=-1))
        own_q, own_dout, own_out = torch.split(heads, q.shape[-1], dim=-1)
        own = (own_dout.contiguous(), own_q.contiguous(), k, v, own_out.contiguous(), self._lse_to_heads(lse))
        dq, dk, dv = self.attention.backward(*own, mask, scale)
        return self._to_rows(dq), dk, dv

    def _to_heads(self, x_BQHD: Tensor) -> Tensor:
        """[B, Q, H, D] -> [B, U Q, H / U, D]."""
        return torch.cat(self._exchange(x_BQHD.chunk(self.sequence.ulysses.size(), dim=2)), dim=1)

    def _to_rows(self, x_BTHD: Tensor) -> Tensor:
        """[B, U Q, H / U, D] -> [B, Q, H, D]."""
        return torch.cat(self._exchange(x_BTHD.chunk(self.sequence.ulysses.size(), dim=1)), dim=2)

    def _lse_to_heads(self, lse_BHQ: Tensor) -> Tensor:
        return torch.cat(self._exchange(lse_BHQ.chunk(self.sequence.ulysses.size(), dim=1)), dim=2)

    def _lse_to_rows(self, lse_BHT: Tensor) -> Tensor:
        return torch.cat(self._exchange(lse_BHT.chunk(self.sequence.ulysses.size(), dim=2)), dim=1)

    def _exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return self.sequence.communication.all_to_all([part.contiguous() for part in parts], self.sequence.ulysses)


def spread_heads(
    key_BSKD: Tensor, value_BSKD: Tensor, layout: Layout, sequence: SequenceGroup
) -> tuple[Tensor, Tensor]:
    """Keys and values of this rank's rows -> those of its key heads for all rows of the Ulysses group.

    [B, T, max(1, K / U), D] each, rows in order of position; differentiable once. A head that several ranks read gets
    the sum of their gradients.
    """
    both: Tensor = _SpreadHeads.apply(torch.stack((key_BSKD, value_BSKD)), layout, sequence)  # type: ignore[no-untyped-call]
    return both[0], both[1]


class _SpreadHeads(torch.autograd.Function):
    """Of [2, B, S, K, D]."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, layout: Layout, sequence: SequenceGroup) -> Tensor:
        ctx.layout, ctx.sequence, ctx.key_heads = layout, sequence, both.shape[3]
        group = sequence.ulysses
        parts = [both[:, :, :, key_heads_of(u, both.shape[3], group.size())].contiguous() for u in range(group.size())]
        received = [part.flatten(0, 1) for part in sequence.communication.all_to_all(parts, group)]
        spread = layout.segment_rows(sequence.ring.rank(), received)
        return spread.view(*both.shape[:2], *spread.shape[1:])

    @staticmethod
    @once_differentiable("the exchange of heads")
    def backward(ctx: Any, dspread: Tensor) -> tuple[Tensor, None, None]:
        group, wide = ctx.sequence.ulysses, torch.promote_types(dspread.dtype, torch.float32)
        parts = ctx.layout.split(dspread.flatten(0, 1), ctx.sequence.ring.rank())
        received = ctx.sequence.communication.all_to_all([part.contiguous() for part in parts], group)
        first = received[0].unflatten(0, dspread.shape[:2])
        dboth = first.new_zeros(*first.shape[:3], ctx.key_heads, first.shape[-1], dtype=wide)
        for u, part in enumerate(received):
            dboth[:, :, :, key_heads_of(u, ctx.key_heads, group.size())] += part.unflatten(0, dspread.shape[:2])
        return dboth.to(dspread.dtype), None, None
