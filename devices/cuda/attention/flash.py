"""PyTorch's FlashAttention-2: aten::_flash_attention_forward and its backward, dense and packed.

Deterministic whenever PyTorch is told to be (its attention_backward.cu reads the switch itself).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchspec.devices._tiles import Tile
from torchspec.devices.cuda.attention.varlen import (
    Capability,
    Packed,
    VarlenKernel,
    flash2_refuses,
    require,
    window_sides,
)


class AtenFlashKernel(VarlenKernel):
    """UnavailableError on a GPU older than Ampere."""

    name = "flash"

    def __init__(self, capability: Capability) -> None:
        require(capability, (8, 0))
        self._capability = capability

    def refuses(self, q: Tensor, tile: Tile) -> str:
        return flash2_refuses(self._capability, q, tile)

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, packed: Packed | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_lengths(q, k, packed), 0.0, tile.causal, False, **_options(tile, scale)
        )
        return out, lse

    def run_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        packed: Packed | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # only dropout reads it
        unused = torch.empty(0, device=q.device)
        lengths = _lengths(q, k, packed)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *lengths, 0.0, tile.causal, rng_state, unused, **_options(tile, scale)
        )
        return dq, dk, dv


def _lengths(q: Tensor, k: Tensor, packed: Packed | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Cumulative lengths of rows and keys, and the longest of each."""
    return (None, None, q.shape[1], k.shape[1]) if packed is None else packed


def _options(tile: Tile, scale: float) -> dict[str, Any]:
    left, right = window_sides(tile)
    return {"scale": scale, "window_size_left": left, "window_size_right": right}
