"""PyTorch's memory-efficient attention: aten::_scaled_dot_product_efficient_attention and its backward.

Deterministic whenever PyTorch is told to be. Shape letters: B batch, Q query rows, S key rows, H heads, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.devices._tiles import BLOCK_ROWS, Tile, TileKinds
from torchspec.devices.cuda.attention.heads import per_key_head, per_query_head
from torchspec.devices.cuda.attention.varlen import Capability


class EfficientKernel:
    name = "efficient"

    def __init__(self, capability: Capability) -> None:
        self._capability = capability

    def refuses(self, q: Tensor, tile: Tile) -> str:
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"no {q.dtype}"
        if q.dtype == torch.bfloat16 and self._capability < (8, 0):
            return "bfloat16 needs compute capability 8.0"
        return "" if q.shape[-1] % 8 == 0 else "head size not a multiple of 8"

    def takes(self, q: Tensor) -> TileKinds:
        return TileKinds(ramp_rows=BLOCK_ROWS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        q_BHQD, k_BHSD, v_BHSD = (per_query_head(x, q.shape[2]) for x in (q, k, v))
        square, bias = _mask(q, tile)
        out_BHQD, padded_lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHQD, k_BHSD, v_BHSD, bias, True, 0.0, square, scale=scale
        )
        return out_BHQD.transpose(1, 2), padded_lse[:, :, : q.shape[1]].contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, heads = q.shape[1:3]
        q_BHQD, k_BHSD, v_BHSD = (per_query_head(x, heads) for x in (q, k, v))
        square, bias = _mask(q, tile)
        lse_padded = F.pad(lse, (0, math.ceil(queries / 32) * 32 - queries), value=math.inf)
        philox = torch.zeros((), dtype=torch.int64, device=q.device)  # only dropout reads it
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            dout.contiguous().transpose(1, 2),
            q_BHQD,
            k_BHSD,
            v_BHSD,
            bias,
            out.contiguous().transpose(1, 2),
            lse_padded,
            philox,
            philox,
            0.0,
            [True, True, True, False],
            square,
            scale=scale,
        )
        return dq.transpose(1, 2), per_key_head(dk, k), per_key_head(dv, v)


def _mask(q: Tensor, tile: Tile) -> tuple[bool, Tensor | None]:
    """(is_causal, additive bias [B, H, Q, S] or None)."""
    rows, keys = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
    if tile.keep_BQS is not None:
        hidden_BQS = ~tile.keep_BQS
    elif tile.causal and rows != keys:
        hidden_BQS = torch.ones(1, rows, keys, dtype=torch.bool, device=q.device).triu_(keys - rows + 1)
    else:
        return tile.causal, None
    batch, _, heads, _ = q.shape
    bias = q.new_zeros(hidden_BQS.shape[0], 1, rows, math.ceil(keys / 16) * 16)[..., :keys]
    return False, bias.masked_fill_(hidden_BQS[:, None], -torch.inf).expand(batch, heads, rows, keys)
