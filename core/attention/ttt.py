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
from torch.autograd.function import once_differentiable

from torchspec.core.interfaces.device import Attention
from torchspec.core.interfaces.mask import MaskSpec


def ttt_attention(
    attention: Attention,
    q_BTHD: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: MaskSpec,
    scale: float,
) -> Tensor:
    """-> out [B, T, H, D] in q's dtype; differentiable once in q, every key and every value.

    keys[0] and values[0], [B, S, K, D], are the prefix seen through `mask`; keys[s] and values[s] for s >= 1,
    [B, T, K, D], hold row i's own key of step s at row i. H is a multiple of K. With keys[0] alone this is plain
    attention. `scale` multiplies q.k. Diagonal terms and sums run in fp32 (fp64 for fp64) whatever the input dtype.
    """
    assert len(keys) == len(values) >= 1, f"{len(keys)} keys, {len(values)} values"
    for key, value in zip(keys[1:], values[1:], strict=True):
        assert key.shape == value.shape == (*q_BTHD.shape[:2], *keys[0].shape[2:]), "a diagonal holds one key per row"
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
    @once_differentiable
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
            for rows in _chunks(ctx.attention, keys[1:]):
                k_BTKND, v_BTKND = _stacked(keys[1:], rows), _stacked(values[1:], rows)
                q, dout, out, dq = (_grouped(x, rows, k_BTKND) for x in (q_BTHD, dout_BTHD, out_BTHD, prefix_dq_BTHD))
                lse_BTKG = _grouped_lse(lse_BHT, rows, k_BTKND)
                weights_BTKGN = (q @ k_BTKND.mT).mul_(ctx.scale).sub_(lse_BTKG[..., None]).exp_()
                delta_BTKG = (dout * out).sum(-1)
                dscores_BTKGN = (dout @ v_BTKND.mT).sub_(delta_BTKG[..., None]).mul_(weights_BTKGN).mul_(ctx.scale)
                dq_BTHD[:, rows] = (dq + dscores_BTKGN @ k_BTKND).flatten(2, 3)
                _scatter(dscores_BTKGN.mT @ q, dkeys[1:], rows)
                _scatter(weights_BTKGN.mT @ dout, dvalues[1:], rows)
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
    for rows in _chunks(attention, keys):
        k_BTKND, v_BTKND = _stacked(keys, rows), _stacked(values, rows)
        q, prefix_out = (_grouped(x, rows, k_BTKND) for x in (q_BTHD, prefix_BTHD))
        scores_BTKGN = (q @ k_BTKND.mT).mul_(scale)
        prefix_lse_BTKG = _grouped_lse(prefix_lse_BHT, rows, k_BTKND)
        lse_BTKG = torch.logaddexp(prefix_lse_BTKG, scores_BTKGN.logsumexp(-1))
        weights_BTKGN = scores_BTKGN.sub_(lse_BTKG[..., None]).exp_()
        out = (weights_BTKGN @ v_BTKND).addcmul_(prefix_out, (prefix_lse_BTKG - lse_BTKG).exp_()[..., None])
        out_BTHD[:, rows] = out.flatten(2, 3)
        lse_BHT[:, :, rows] = lse_BTKG.flatten(2, 3).transpose(1, 2)
    return out_BTHD, lse_BHT


def _chunks(attention: Attention, keys: Sequence[Tensor]) -> Iterator[slice]:
    """Row ranges for which one stacked tensor of the keys, in fp32, has the device's preferred size."""
    batch, count, heads, size = keys[0].shape
    step = max(1, attention.temporary_bytes // (4 * batch * len(keys) * heads * size))
    return (slice(start, start + step) for start in range(0, count, step))


def _stacked(x: Sequence[Tensor], rows: slice) -> Tensor:
    """[B, rows, K, N, D] in the wide dtype: with the keys of a row side by side, each product is one matrix product."""
    return _wide(torch.stack([part[:, rows] for part in x], dim=-2))


def _grouped(x_BTHD: Tensor, rows: slice, k_BTKND: Tensor) -> Tensor:
    """[B, rows, K, G, D] in the wide dtype."""
    batch, count, heads, _, size = k_BTKND.shape
    return _wide(x_BTHD[:, rows]).view(batch, count, heads, -1, size)


def _grouped_lse(lse_BHT: Tensor, rows: slice, k_BTKND: Tensor) -> Tensor:
    """[B, rows, K, G]."""
    batch, count, heads = k_BTKND.shape[:3]
    return lse_BHT[:, :, rows].transpose(1, 2).view(batch, count, heads, -1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scatter(grad_BTKND: Tensor, grads: Sequence[Tensor], rows: slice) -> None:
    for step, grad_BTKD in enumerate(grads):
        grad_BTKD[:, rows] = grad_BTKND[..., step, :]
