"""Attention of blocks that are drafted at once (DFlash, 2602.06036): to the context, and within the block.

A row of queries is A blocks of L consecutive slots. A slot sees the context before its block's anchor and slots of its
own block; one softmax runs over both. The context part goes over ranks as `core.attention.forms` says; blocks stay
where their queries are, and are to the device a batch of B A short sequences. The parts are merged exactly, in fp32.
The backward hands the *merged* out and lse to both, so that each returns its exact share; those of the queries add up.
Memory is O(rows).

Shape letters: B batch, A blocks of a row, L slots of a block, Q = A L queries, S context keys, H query heads, K key
heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.core.interfaces.device import Attention
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.lse import merge
from torchspec.core.ops.once import once_differentiable


@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """What the slots of a block see. Slot l stands at position anchor + l; of the

    context      the keys before the anchor, from the first of its document on: first <= j < anchor
    own block    every slot m, or those with m <= l if `causal`

    and of both, with a `window`, none that stands `window` or more positions before the slot.

    Raises ValueError for a size or a window below 1.
    """

    size: int
    causal: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or (self.window is not None and self.window < 1):
            raise ValueError(f"a block has at least 1 slot and a window at least 1 key, got {self}")

    def context(self, anchor_BA: Tensor, first_BA: Tensor) -> MaskSpec:
        """Limits of A L queries, from each block's anchor and the first position of the anchor's document.

        Both in positions of the keys, int64 on the host, where attention is planned. A block with anchor = first sees
        no context: one at the start of its document, or one that only fills the row. Under Ulysses the blocks are
        those of all `SequenceGroup.peers`, in their order.
        """
        start_BAL, end_BAL = (x_BA[..., None].expand(-1, -1, self.size) for x_BA in (first_BA, anchor_BA))
        if self.window is not None:
            oldest_BAL = end_BAL + torch.arange(self.size) - self.window + 1
            start_BAL = torch.minimum(torch.maximum(start_BAL, oldest_BAL), end_BAL)
        return MaskSpec.limits(start_BAL.flatten(1), end_BAL.flatten(1))

    def own(self) -> MaskSpec:
        """The mask of L queries on L keys, the same for every block."""
        if self.window is None or self.window >= self.size:
            return MaskSpec.causal() if self.causal else MaskSpec.full()
        if self.causal:
            return MaskSpec.sliding(self.window)
        slot_1L = torch.arange(self.size)[None]
        return MaskSpec.limits((slot_1L - self.window + 1).clamp_min(0), torch.full_like(slot_1L, self.size))


@dataclass(frozen=True, kw_only=True)
class BlockForm:
    """Who attends to what.

    context   to the context, whose keys may be spread over ranks: `AttentionForm.attention`
    own       to the blocks: the device's
    mask      which context keys each query sees (`BlockMask.context`)
    block     which slots of its block
    scale     of q.k
    """

    context: Attention
    own: Attention
    mask: MaskSpec
    block: BlockMask
    scale: float


def block_attention(
    form: BlockForm, q_BQHD: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]
) -> Tensor:
    """-> out [B, Q, H, D] in q's dtype; differentiable once in q and both pairs of keys and values.

    `context` are keys and values as `AttentionForm.spread` left them, [B, S, K, D] without ranks that share sequences,
    where S may be 0; a collective where there are such ranks. `own` are those of the slots, [B, Q, K, D]. Q is a
    multiple of the block's size, and not 0; H is a multiple of K. Parts are merged in fp32 (fp64 for fp64) whatever
    the input dtype.
    """
    queries, size = q_BQHD.shape[1], form.block.size
    assert queries >= size, "no block"
    assert queries % size == 0, f"{queries} queries are no blocks of {size}"
    for x_BQKD in own:
        assert x_BQKD.shape[:2] == q_BQHD.shape[:2], "each slot has one key of its own"
    out: Tensor = _BlockAttention.apply(form, q_BQHD, *context, *own)  # type: ignore[no-untyped-call]
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: BlockForm, q_BQHD: Tensor, *keys_values: Tensor) -> Tensor:
        context_key, context_value, own_key, own_value = keys_values
        part = form.context.forward(q_BQHD, context_key, context_value, form.mask, form.scale)
        q_NLHD, key_NLKD, value_NLKD = (_blocks(x, form.block.size) for x in (q_BQHD, own_key, own_value))
        own_NLHD, own_lse_NHL = form.own.forward(q_NLHD, key_NLKD, value_NLKD, form.block.own(), form.scale)
        merged_BQHD, lse_BHQ = merge(*part, own_NLHD.reshape(q_BQHD.shape), _lse_rows(own_lse_NHL, len(q_BQHD)))
        out_BQHD = merged_BQHD.to(q_BQHD.dtype)
        ctx.save_for_backward(q_BQHD, out_BQHD, lse_BHQ, *keys_values)
        ctx.form = form
        return out_BQHD

    @staticmethod
    @once_differentiable("block attention")
    def backward(ctx: Any, dout_BQHD: Tensor) -> tuple[Tensor | None, ...]:
        form: BlockForm = ctx.form
        q_BQHD, out_BQHD, lse_BHQ, context_key, context_value, own_key, own_value = ctx.saved_tensors
        dq_BQHD, dcontext_key, dcontext_value = form.context.backward(
            dout_BQHD, q_BQHD, context_key, context_value, out_BQHD, lse_BHQ, form.mask, form.scale
        )
        dout_NLHD, q_NLHD, key_NLKD, value_NLKD, out_NLHD = (
            _blocks(x, form.block.size) for x in (dout_BQHD, q_BQHD, own_key, own_value, out_BQHD)
        )
        lse_NHL = _lse_blocks(lse_BHQ, form.block.size)
        dq_NLHD, dkey_NLKD, dvalue_NLKD = form.own.backward(
            dout_NLHD, q_NLHD, key_NLKD, value_NLKD, out_NLHD, lse_NHL, form.block.own(), form.scale
        )
        dq_BQHD = dq_BQHD + dq_NLHD.reshape(dq_BQHD.shape)
        dkey_BQKD, dvalue_BQKD = dkey_NLKD.reshape(own_key.shape), dvalue_NLKD.reshape(own_value.shape)
        return None, dq_BQHD, dcontext_key, dcontext_value, dkey_BQKD, dvalue_BQKD


def _blocks(x_BQHD: Tensor, size: int) -> Tensor:
    """[B A, L, H, D]."""
    return x_BQHD.reshape(-1, size, *x_BQHD.shape[2:])


def _lse_rows(lse_NHL: Tensor, batch: int) -> Tensor:
    """[B A, H, L] -> [B, H, Q]."""
    _, heads, size = lse_NHL.shape
    return lse_NHL.view(batch, -1, heads, size).transpose(1, 2).reshape(batch, heads, -1)


def _lse_blocks(lse_BHQ: Tensor, size: int) -> Tensor:
    """[B, H, Q] -> [B A, H, L], contiguous as devices return it."""
    batch, heads, _ = lse_BHQ.shape
    return lse_BHQ.view(batch, heads, -1, size).transpose(1, 2).reshape(-1, heads, size).contiguous()
