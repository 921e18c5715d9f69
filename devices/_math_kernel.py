"""Attention written with matrix products only: any device, any dtype, any head size. The last rung of every ladder.

Works in fp32 (fp64 for fp64) over blocks of query rows, so scores are never larger than [B, H, 256, S].

Shape letters: B batch, Q query rows, S key rows, H query heads, K key heads, G query heads per key head, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchspec.devices._tiled_attention import statistics_dtype
from torchspec.devices._tiles import BLOCK_ROWS, Tile, TileKinds


class MathKernel:
    """`Kernel` in plain torch."""

    name = "math"

    def refuses(self, q: Tensor, tile: Tile) -> str:
        return ""

    def takes(self, q: Tensor) -> TileKinds:
        return TileKinds(windows=True, documents=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        q_BKGQD, k_BKSD, v_BKSD = _grouped(q, k.shape[2]), _heads_first(k), _heads_first(v)
        out_BKGQD = torch.empty_like(q_BKGQD)
        lse_BKGQ = q_BKGQD.new_empty(q_BKGQD.shape[:-1])
        for rows, keys, scores_BKGQS in _score_blocks(q_BKGQD, k_BKSD, tile, scale):
            lse = scores_BKGQS.logsumexp(-1)
            lse_BKGQ[..., rows] = lse
            weights = (scores_BKGQS - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp_()
            out_BKGQD[..., rows, :] = weights @ v_BKSD[:, :, None, keys]
        return _rows_first(out_BKGQD).to(q.dtype), lse_BKGQ.flatten(1, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = k.shape[2]
        q_BKGQD, k_BKSD, v_BKSD = _grouped(q, heads), _heads_first(k), _heads_first(v)
        dout_BKGQD, out_BKGQD = _grouped(dout, heads), _grouped(out, heads)
        lse_BKGQ = _split_heads(lse, heads)
        delta_BKGQ = (dout_BKGQD * out_BKGQD).sum(-1)
        dq_BKGQD, dk_BKSD, dv_BKSD = torch.empty_like(q_BKGQD), torch.zeros_like(k_BKSD), torch.zeros_like(v_BKSD)
        for rows, keys, scores_BKGQS in _score_blocks(q_BKGQD, k_BKSD, tile, scale):
            weights = scores_BKGQS.sub_(lse_BKGQ[..., rows, None]).exp_()
            dout_block = dout_BKGQD[..., rows, :]
            dv_BKSD[:, :, keys] += (weights.mT @ dout_block).sum(2)
            dscores = (dout_block @ v_BKSD[:, :, None, keys].mT).sub_(delta_BKGQ[..., rows, None])
            dscores.mul_(weights).mul_(scale)
            dq_BKGQD[..., rows, :] = dscores @ k_BKSD[:, :, None, keys]
            dk_BKSD[:, :, keys] += (dscores.mT @ q_BKGQD[..., rows, :]).sum(2)
        dk, dv = dk_BKSD.transpose(1, 2), dv_BKSD.transpose(1, 2)
        return _rows_first(dq_BKGQD).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _score_blocks(q_BKGQD: Tensor, k_BKSD: Tensor, tile: Tile, scale: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, keys, scores) of each block of rows, with the keys that any of them sees; -inf where masked."""
    for document, document_keys in tile.documents():
        for start in range(document.start, document.stop, BLOCK_ROWS):
            rows, keys = slice(start, min(start + BLOCK_ROWS, document.stop)), document_keys
            offset = keys.stop - document.stop  # a causal row's last key, counted from the row itself
            if tile.causal:
                first = keys.start if tile.window is None else max(keys.start, start + offset - tile.window + 1)
                keys = slice(first, rows.stop + offset)
            scores_BKGQS = (q_BKGQD[..., rows, :] * scale) @ k_BKSD[:, :, None, keys].mT
            if tile.causal:
                last_Q1 = torch.arange(rows.start + offset, rows.stop + offset, device=q_BKGQD.device)[:, None]
                key_S = torch.arange(keys.start, keys.stop, device=q_BKGQD.device)
                hidden_QS = key_S > last_Q1
                if tile.window is not None:
                    hidden_QS |= key_S <= last_Q1 - tile.window
                scores_BKGQS.masked_fill_(hidden_QS, -torch.inf)
            elif tile.keep_BQS is not None:
                scores_BKGQS.masked_fill_(~tile.keep_BQS[:, None, None, rows], -torch.inf)
            yield rows, keys, scores_BKGQS


def _grouped(x_BQHD: Tensor, key_heads: int) -> Tensor:
    return _split_heads(_heads_first(x_BQHD), key_heads)


def _split_heads(x: Tensor, key_heads: int) -> Tensor:
    """[B, H, ...] -> [B, K, G, ...]."""
    return x.reshape(x.shape[0], key_heads, -1, *x.shape[2:])


def _heads_first(x_BSHD: Tensor) -> Tensor:
    return x_BSHD.transpose(1, 2).to(statistics_dtype(x_BSHD.dtype))


def _rows_first(x_BKGQD: Tensor) -> Tensor:
    return x_BKGQD.flatten(1, 2).transpose(1, 2)
