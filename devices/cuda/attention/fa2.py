"""The flash-attn package, 2.7 or newer (flash_attn/flash_attn_interface.py). Its functions are called with keywords."""

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
    package,
    require,
    window_sides,
)

_CUTS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_WANTED = {
    "_flash_attn_forward": ("window_size_left",),  # versions before 2.7 have window_size
    "_flash_attn_backward": ("window_size_left", "deterministic"),
    "_flash_attn_varlen_forward": ("window_size_left", *_CUTS),
    "_flash_attn_varlen_backward": ("window_size_left", "deterministic", *_CUTS),
}


class FlashAttn2Kernel(VarlenKernel):
    name = "fa2"

    def __init__(self, capability: Capability, interface: Any) -> None:
        self._capability = capability
        self._interface = interface

    @classmethod
    def load(cls, capability: Capability) -> FlashAttn2Kernel:
        """UnavailableError on a GPU older than Ampere, and without the package."""
        interface = package("flash_attn.flash_attn_interface", _WANTED)
        require(capability, (8, 0))
        return cls(capability, interface)

    def refuses(self, q: Tensor, tile: Tile) -> str:
        return flash2_refuses(self._capability, q, tile)

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, packed: Packed | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        package = self._interface
        forward = package._flash_attn_forward if packed is None else package._flash_attn_varlen_forward
        out, lse, *_ = forward(q=q, k=k, v=v, return_softmax=False, **_options(tile, packed, scale))
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
        package = self._interface
        backward = package._flash_attn_backward if packed is None else package._flash_attn_varlen_backward
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        backward(
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=None,
            **_options(tile, packed, scale),
        )
        return dq, dk, dv


def _options(tile: Tile, packed: Packed | None, scale: float) -> dict[str, Any]:
    left, right = window_sides(tile)
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": tile.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": 0.0,
        "alibi_slopes": None,
        **({} if packed is None else dict(zip(_CUTS, packed, strict=True))),
    }
