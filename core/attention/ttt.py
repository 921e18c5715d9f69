"""Attention of the training-time test (EAGLE-3, 2503.01840; slot by slot in docs/concepts.md).

At unroll step k a slot sees the step-0 keys that a mask allows and, for each step s = 1..k, the one key that the same
slot wrote at step s. One softmax runs over all of them. The step-0 part is the device's flash attention; a diagonal key
is a part with out = v and lse = scale q.k; the parts are merged exactly. The backward hands the *merged* out and lse to
the device, which then returns the step-0 part's exact gradients; the diagonals are in closed form. Memory is O(rows):
keys and values are kept by reference, and diagonals are worked on in chunks of rows.

Shape letters: B batch, T rows, S step-0 keys, H query heads, K key heads, G query heads per key head, N diagonal keys
of a row, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchspec.core.interfaces.device import Attention
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.once import once_differentiable


def ttt_attention(
    attention: Attention,
    q_BTHD: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: MaskSpec,
    scale: float,
) -> Tensor:
    """-> out [B, T, H, D] in q's dtype; differentiable once in q, every key and every value.

    keys[0] and values[0], [B, S, K, D], are the prefix seen through `mask`; an `attention` whose keys are spread over
    ranks says what it wants there (`core.attention.forms`). keys[s] and values[s] for s >= 1,
    [B, T, K, D], hold row i's own key of step s at row i. H is a multiple of K. With keys[0] alone this is plain
    attention. `scale` multiplies q.k. Diagonal terms and sums run in fp32 (fp64 for fp64) whatever the input dtype.
    """
    assert len(keys) == len(values) >= 1, f"{len(keys)} keys, {len(values)} values"
    for key, value in zip(keys[1:], values[1:], strict=True):
        assert (*q_BTHD.shape[:2], *key.shape[2:]) == key.shape == value.shape, "a diagonal holds one key per row"
    out: Tensor = _TTTAttention.apply(attention, mask, scale, q_BTHD, *keys, *values)  # type: ignore[no-untyped-call]
    return out


class _TTTAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attention: Attention, mask: MaskSpec, scale: float, q_BTHD: Tensor, *keys_values: Tensor
    ) -> Tensor:
        steps = len(keys_values) // 2
        keys, values = keys_values[:steps], keys_values[steps:]
        out_BTHD, lse_BHT = attention.forward(q_BTHD, keys[0], values[0], mask, scale)
        if steps > 1:
            out_BTHD, lse_BHT = _add_diagonals(attention, q_BTHD, keys[1:], values[1:], (out_BTHD, lse_BHT), scale)
        ctx.save_for_backward(q_BTHD, out_BTHD, lse_BHT, *keys_values)
        ctx.attention, ctx.mask, ctx.scale = attention, mask, scale
        return out_BTHD

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx: Any, dout_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHD, out_BTHD, lse_BHT, *keys_values = ctx.saved_tensors
        steps = len(keys_values) // 2
        keys, values = keys_values[:steps], keys_values[steps:]
        dq_BTHD, dk, dv = ctx.attention.backward(
            dout_BTHD, q_BTHD, keys[0], values[0], out_BTHD, lse_BHT, ctx.mask, ctx.scale
        )
        dkeys = [dk, *(torch.empty_like(key) for key in keys[1:])]
        dvalues = [dv, *(torch.empty_like(value) for value in values[1:])]
        if steps > 1:
            prefix_dq_BTHD, dq_BTHD = dq_BTHD, torch.empty_like(q_BTHD)
            for rows in _chunks(ctx.attention, q_BTHD):
                groups = keys[1].shape[2]
                q, dout, out, dq = (_grouped(x, rows, groups) for x in (q_BTHD, dout_BTHD, out_BTHD, prefix_dq_BTHD))
                lse_BTKG = _grouped_lse(lse_BHT, rows, groups)
                delta_BTKG = torch.linalg.vecdot(dout, out)
                for key, value, dkey, dvalue in zip(keys[1:], values[1:], dkeys[1:], dvalues[1:], strict=True):
                    k_BTK1D, v_BTK1D = _own(key, rows), _own(value, rows)
                    weight = torch.linalg.vecdot(q, k_BTK1D).mul_(ctx.scale).sub_(lse_BTKG).exp_()[..., None]
                    dscore = torch.linalg.vecdot(dout, v_BTK1D).sub_(delta_BTKG)[..., None].mul_(weight).mul_(ctx.scale)
                    dq = torch.addcmul(dq, dscore, k_BTK1D)
                    dkey[:, rows] = (dscore * q).sum(3)
                    dvalue[:, rows] = (weight * dout).sum(3)
                dq_BTHD[:, rows] = dq.flatten(2, 3)
        return (None, None, None, dq_BTHD, *dkeys, *dvalues)


def _add_diagonals(
    attention: Attention,
    q_BTHD: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    prefix: tuple[Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the prefix's keys and the diagonals: lse.merge, with each weight taken against the final lse."""
    prefix_BTHD, prefix_lse_BHT = prefix
    out_BTHD, lse_BHT = torch.empty_like(q_BTHD), torch.empty_like(prefix_lse_BHT)
    groups = keys[0].shape[2]
    for rows in _chunks(attention, q_BTHD):
        q, prefix_out = (_grouped(x, rows, groups) for x in (q_BTHD, prefix_BTHD))
        scores_BTKGN = torch.stack([torch.linalg.vecdot(q, _own(key, rows)) for key in keys], dim=-1).mul_(scale)
        prefix_lse_BTKG = _grouped_lse(prefix_lse_BHT, rows, groups)
        lse_BTKG = torch.logaddexp(prefix_lse_BTKG, scores_BTKGN.logsumexp(-1))
        weights_BTKGN = scores_BTKGN.sub_(lse_BTKG[..., None]).exp_()
        out = prefix_out * (prefix_lse_BTKG - lse_BTKG).exp_()[..., None]
        for value, weight_BTKG in zip(values, weights_BTKGN.unbind(-1), strict=True):
            out.addcmul_(weight_BTKG[..., None], _own(value, rows))
        out_BTHD[:, rows] = out.flatten(2, 3)
        lse_BHT[:, :, rows] = lse_BTKG.flatten(2, 3).transpose(1, 2)
    return out_BTHD, lse_BHT


def _chunks(attention: Attention, q_BTHD: Tensor) -> Iterator[slice]:
    """Row ranges for which queries in fp32 have the size that the device prefers of a temporary."""
    batch, count, heads, size = q_BTHD.shape
    step = max(1, attention.temporary_bytes // (4 * batch * heads * size))
    return (slice(start, start + step) for start in range(0, count, step))


def _own(x_BTKD: Tensor, rows: slice) -> Tensor:
    """[B, rows, K, 1, D] in the wide dtype: each row's own key or value, for every query head of its group."""
    return _wide(x_BTKD[:, rows])[:, :, :, None]


def _grouped(x_BTHD: Tensor, rows: slice, groups: int) -> Tensor:
    """[B, rows, K, G, D] in the wide dtype."""
    x = _wide(x_BTHD[:, rows])
    return x.view(*x.shape[:2], groups, -1, x.shape[-1])


def _grouped_lse(lse_BHT: Tensor, rows: slice, groups: int) -> Tensor:
    """[B, rows, K, G]."""
    lse_BTH = lse_BHT[:, :, rows].transpose(1, 2)
    return lse_BTH.view(*lse_BTH.shape[:2], groups, -1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
