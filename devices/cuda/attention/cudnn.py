"""cuDNN's attention through PyTorch: aten::_scaled_dot_product_cudnn_attention and its backward.

Square causal or unmasked tiles: its causal mask is aligned upper left, and its masks come and go with its versions. Not
deterministic (PyTorch's sdp_utils.cpp). Shape letters: B batch, Q query rows, S key rows, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.devices._tiles import BLOCK_ROWS, Tile, TileKinds
from torchspec.devices.cuda.attention.heads import per_key_head, per_query_head
from torchspec.devices.cuda.attention.varlen import Capability, half_refuses, require


class CudnnKernel:
    """UnavailableError on a GPU older than Ampere."""

    name = "cudnn"

    def __init__(self, capability: Capability) -> None:
        require(capability, (8, 0))
        self._lse_axes = 4  # [B, H, Q, 1]; the last one is gone in newer versions of PyTorch, whose forward tells

    def refuses(self, q: Tensor, tile: Tile) -> str:
        rows, keys = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        if torch.are_deterministic_algorithms_enabled():
            return "not deterministic"
        if tile.causal and rows != keys:
            return "no causal tiles with more keys than rows"
        return "no single keys" if keys == 1 else half_refuses(q, tile, 128)

    def takes(self, q: Tensor) -> TileKinds:
        return TileKinds(ramp_rows=BLOCK_ROWS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        q_BHQD, k_BHSD, v_BHSD = (per_query_head(x, q.shape[2]) for x in (q, k, v))
        out_BHQD, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_BHQD, k_BHSD, v_BHSD, None, True, 0.0, tile.causal, False, scale=scale
        )
        self._lse_axes = lse.ndim
        return out_BHQD.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1]).contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_BHQD, k_BHSD, v_BHSD = (per_query_head(x, q.shape[2]) for x in (q, k, v))
        lse = lse.contiguous()
        philox = torch.zeros((), dtype=torch.int64, device=q.device)  # only dropout reads it
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout.contiguous().transpose(1, 2),
            q_BHQD,
            k_BHSD,
            v_BHSD,
            out.contiguous().transpose(1, 2),
            lse[..., None] if self._lse_axes == 4 else lse,
            philox,
            philox,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            tile.causal,
            scale=scale,
        )
        return dq.transpose(1, 2), per_key_head(dk, k), per_key_head(dv, v)
