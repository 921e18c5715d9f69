"""The flash-attn-3 package for Hopper (hopper/flash_attn_interface.py), called with keywords: its backward takes the
cumulative lengths before dq, dk and dv, and calls `is_causal` what its forward calls `causal`.

Its operators are those registered with torch.library; the beta's functions of the same names, with `window_size`, are
refused. So are deterministic algorithms: some versions were built with that backward left out, and take and ignore
`deterministic`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchspec.devices._tiles import Tile
from torchspec.devices.api import UnavailableError
from torchspec.devices.cuda.attention.varlen import (
    Capability,
    Packed,
    VarlenKernel,
    half_refuses,
    package,
    window_sides,
)

_CUTS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_WANTED = {
    "_flash_attn_forward": ("causal", "window_size_left", *_CUTS),
    "_flash_attn_backward": ("is_causal", "window_size_left", "deterministic", *_CUTS),
}


class FlashAttn3Kernel(VarlenKernel):
    name = "fa3"

    def __init__(self, interface: Any) -> None:
        self._interface = interface

    @classmethod
    def load(cls, capability: Capability) -> FlashAttn3Kernel:
        """UnavailableError on GPUs other than Hopper, and without the package."""
        interface = package("flash_attn_interface", _WANTED)
        if capability != (9, 0):
            raise UnavailableError(f"needs compute capability 9.0, this GPU has {capability[0]}.{capability[1]}")
        return cls(interface)

    def refuses(self, q: Tensor, tile: Tile) -> str:
        if torch.are_deterministic_algorithms_enabled():
            return "not deterministic in every version"
        return half_refuses(q, tile, 256)

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, packed: Packed | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        options = _options(tile, packed, scale)
        out, lse, *_ = self._interface._flash_attn_forward(q=q, k=k, v=v, causal=tile.causal, **options)
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
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        self._interface._flash_attn_backward(
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            is_causal=tile.causal,
            deterministic=False,
            **_options(tile, packed, scale),
        )
        return dq, dk, dv


def _options(tile: Tile, packed: Packed | None, scale: float) -> dict[str, Any]:
    left, right = window_sides(tile)
    return {
        "softmax_scale": scale,
        "window_size_left": left,
        "window_size_right": right,
        **({} if packed is None else dict(zip(_CUTS, packed, strict=True))),
    }
