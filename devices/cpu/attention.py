"""PyTorch's flash attention for the CPU, called directly because the log-sum-exp is needed.

Facts about the operator that shape this file (torch 2.13, each held by a test): its lse is not contiguous; `is_causal`
is aligned upper left; masks are additive, fp32 also for fp16 and bf16, but an fp32 mask beside fp64 is misread without
an error; zero rows or keys kill the process; query heads may be a multiple of key heads.

Shape letters: B batch, Q query rows, S key rows, H query heads, K key heads, G query heads per key head, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.devices._tiled_attention import statistics_dtype
from torchspec.devices._tiles import BLOCK_ROWS, Tile, TileKinds

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class CpuFlashKernel:
    """`Kernel` over aten's CPU flash attention; fp16, bf16, fp32 and fp64, any head size."""

    def takes(self, q: Tensor) -> TileKinds:
        return TileKinds(ramp_rows=BLOCK_ROWS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        batch, queries, heads, size = q.shape
        # One query row, as in decoding: the query heads of a group become rows, so each key is read once.
        q_BHQD = q.reshape(batch, k.shape[2], -1, size) if queries == 1 else q.transpose(1, 2)
        square, bias = _mask(tile, statistics_dtype(q.dtype))
        out_BHQD, lse_BHQ = _forward(
            q_BHQD, k.transpose(1, 2), v.transpose(1, 2), 0.0, square, attn_mask=bias, scale=scale
        )
        if queries == 1:
            return out_BHQD.reshape(batch, 1, heads, size), lse_BHQ.reshape(batch, heads, 1)
        return out_BHQD.transpose(1, 2), lse_BHQ.contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        square, bias = _mask(tile, statistics_dtype(q.dtype))
        heads_first = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        grads = _backward(*heads_first, lse, 0.0, square, attn_mask=bias, scale=scale)
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv


def _mask(tile: Tile, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """(is_causal, additive mask of `dtype` broadcastable to [B, H, Q, S], or None)."""
    if tile.keep_BQS is not None:
        bias_BQS = torch.zeros(tile.keep_BQS.shape, dtype=dtype).masked_fill_(~tile.keep_BQS, -torch.inf)
        return False, bias_BQS[:, None]
    if not tile.causal:
        return False, None
    rows, keys = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
    if rows == keys:
        return True, None
    return False, torch.full((rows, keys), -torch.inf, dtype=dtype).triu_(keys - rows + 1)
