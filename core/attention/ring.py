"""Ring attention (2310.01889) as an `Attention`: blocks of keys and values go round, queries stay.

Each rank holds the keys of its ring index, ordered by position. A mask says, in positions of the whole sequence, which
interval of keys each local query sees; what remains of an interval among a block's keys, which are ordered too, is an
interval again, so every block is one call of the device's attention, and none where it shows nothing to anyone. Outputs
are merged by their log-sum-exps in fp32; the backward gives the device the *merged* out and lse, so that it returns the
block's exact share, and the blocks' gradients travel on with them in fp32 until they are home.

Exchanges overlap with the work on the block at hand.

Shape letters: B batch, Q queries, S keys of a ring index, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.core.interfaces.device import Attention
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.lse import merge
from torchspec.core.parallel.sequence import SequenceGroup
from torchspec.core.parallel.shards import Layout, Piece


@dataclass(frozen=True, kw_only=True)
class RingAttention:
    """Implements `Attention` for keys spread over `sequence.ring`; masks are limits in positions of the sequence."""

    attention: Attention
    sequence: SequenceGroup
    layout: Layout

    @property
    def temporary_bytes(self) -> int:
        return self.attention.temporary_bytes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> tuple[Tensor, Tensor]:
        out: Tensor | None = None
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=_wide(q.dtype))
        block = torch.stack((k, v))
        for hop in range(self.sequence.ring.size()):
            last = hop + 1 == self.sequence.ring.size()
            following, wait = (block, None) if last else self._send_on(block)
            seen = self._mask_of(mask, hop)
            if seen is not None:
                part, part_lse = self.attention.forward(q, block[0], block[1], seen, scale)
                out, lse = (part, part_lse) if out is None else merge(out, lse, part, part_lse)
            if wait is not None:
                wait()
            block = following
        return (torch.zeros_like(q) if out is None else out.to(q.dtype)), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: MaskSpec, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq = torch.zeros_like(q, dtype=_wide(q.dtype))
        block = torch.stack((k, v))
        dblock = torch.zeros_like(block, dtype=_wide(block.dtype))
        home = None  # until the gradients of the block at hand have arrived
        for hop in range(self.sequence.ring.size()):
            last = hop + 1 == self.sequence.ring.size()
            following, wait = (block, None) if last else self._send_on(block)
            seen = self._mask_of(mask, hop)
            parts = (
                None if seen is None else self.attention.backward(dout, q, block[0], block[1], out, lse, seen, scale)
            )
            if home is not None:
                home()
            if parts is not None:
                dq += parts[0]
                dblock[0] += parts[1]
                dblock[1] += parts[2]
            dblock, home = self._send_on(dblock)
            if wait is not None:
                wait()
            block = following
        assert home is not None
        home()
        return dq.to(q.dtype), dblock[0].to(k.dtype), dblock[1].to(v.dtype)

    def _send_on(self, block: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return self.sequence.communication.ring_exchange(block, self.sequence.ring)

    def _mask_of(self, mask: MaskSpec, hop: int) -> MaskSpec | None:
        """What the mask leaves of the block that has come `hop` ranks far; None if nothing."""
        assert mask.kind == "limits", f"ring attention is told the interval of every query, got a mask {mask.kind!r}"
        assert mask.key_start_BQ is not None
        assert mask.key_end_BQ is not None
        segments = self.layout.segments((self.sequence.ring.rank() - hop) % self.sequence.ring.size())
        start_BQ, end_BQ = below(mask.key_start_BQ, segments), below(mask.key_end_BQ, segments)
        return MaskSpec.limits(start_BQ, end_BQ) if bool((start_BQ < end_BQ).any()) else None


def below(position: Tensor, segments: tuple[Piece, ...]) -> Tensor:
    """How many rows of the segments lie before each position: its place among them."""
    counts = [(position - start).clamp(0, stop - start) for start, stop in segments]
    return torch.stack(counts).sum(0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
