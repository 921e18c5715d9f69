"""Attention kernels for NVIDIA GPUs, best first; the first that supports a tile runs it, and the choice is logged once.

flash_attn   the package, if installed: fp16 and bf16, head sizes to 256
flash        PyTorch's FlashAttention-2: the same
efficient    PyTorch's memory-efficient attention: also fp32, and masked tiles
math         matrix products: whatever is left (fp64, odd head sizes)

Facts these calls rest on (PyTorch's and flash-attn's sources): flash aligns causal masks lower right and takes grouped
heads; efficient aligns upper left, wants as many key heads as query heads, a bias in q's dtype with 16-element
rows, and an lse padded to 32 rows with +inf; all of them want a contiguous lse.

Shape letters: B batch, Q query rows, S key rows, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.devices._math_kernel import MathKernel
from torchspec.devices._tiled_attention import Kernel
from torchspec.devices._tiles import BLOCK_ROWS, Tile

log = logging.getLogger(__name__)

Capability = tuple[int, int]


class Rung(Kernel, Protocol):
    name: str

    def refuses(self, q: Tensor, tile: Tile) -> str:
        """Why this kernel cannot run the tile; empty if it can."""
        ...


def ladder(capability: Capability) -> Ladder:
    """The kernels usable on a GPU of this compute capability."""
    rungs: list[Rung] = [AtenFlashKernel(capability), EfficientKernel(), MathKernel()]
    package = _flash_attn_package()
    if package is not None:
        rungs.insert(0, FlashAttnKernel(capability, package))
    return Ladder(rungs)


class Ladder:
    """`Kernel` that hands each tile to the first rung that supports it."""

    def __init__(self, rungs: list[Rung]) -> None:
        self._rungs = rungs
        self._chosen: dict[tuple[torch.dtype, int, bool], Rung] = {}

    def ramp_rows(self, q: Tensor) -> int | None:
        unmasked = Tile(rows=slice(0, 1), keys=slice(0, 1))
        return self._choose(q, unmasked).ramp_rows(q)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        return self._choose(q, tile).forward(q, k, v, tile, scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._choose(q, tile).backward(dout, q, k, v, out, lse, tile, scale)

    def _choose(self, q: Tensor, tile: Tile) -> Rung:
        case = (q.dtype, q.shape[-1], tile.keep_BQS is not None)
        if case not in self._chosen:
            refusals: list[str] = []
            for rung in self._rungs:
                reason = rung.refuses(q, tile)
                if not reason:
                    break
                refusals.append(f"{rung.name}: {reason}")
            self._chosen[case] = rung
            log.info(
                "attention of %s, head size %d%s runs on %s%s",
                q.dtype,
                q.shape[-1],
                ", masked" if tile.keep_BQS is not None else "",
                rung.name,
                f" ({'; '.join(refusals)})" if refusals else "",
            )
        return self._chosen[case]


class AtenFlashKernel:
    """aten::_flash_attention_forward and its backward."""

    name = "flash"

    def __init__(self, capability: Capability) -> None:
        self._capability = capability

    def refuses(self, q: Tensor, tile: Tile) -> str:
        return _flash_refuses(self._capability, q, tile)

    def ramp_rows(self, q: Tensor) -> int | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, tile.causal, False, scale=scale
        )
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # only dropout reads it
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            tile.causal,
            rng_state,
            unused,
            scale=scale,
        )
        return dq, dk, dv


class FlashAttnKernel:
    """The flash-attn package (2.7 or newer; its functions take keywords, so another signature fails loudly)."""

    name = "flash_attn"

    def __init__(self, capability: Capability, package: Any) -> None:
        self._capability = capability
        self._package = package

    def refuses(self, q: Tensor, tile: Tile) -> str:
        return _flash_refuses(self._capability, q, tile)

    def ramp_rows(self, q: Tensor) -> int | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._package._wrapped_flash_attn_forward(
            q=q, k=k, v=v, return_softmax=False, **_flash_attn_options(tile, scale)
        )
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        self._package._wrapped_flash_attn_backward(
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=None,
            **_flash_attn_options(tile, scale),
        )
        return dq, dk, dv


class EfficientKernel:
    """aten::_scaled_dot_product_efficient_attention and its backward."""

    name = "efficient"

    def refuses(self, q: Tensor, tile: Tile) -> str:
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"no {q.dtype}"
        return "" if q.shape[-1] % 8 == 0 else "head size not a multiple of 8"

    def ramp_rows(self, q: Tensor) -> int | None:
        return BLOCK_ROWS

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        q_BHQD, k_BHSD, v_BHSD = (_per_query_head(x, q.shape[2]) for x in (q, k, v))
        square, bias = _efficient_mask(q, tile)
        out_BHQD, padded_lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHQD, k_BHSD, v_BHSD, bias, True, 0.0, square, scale=scale
        )
        return out_BHQD.transpose(1, 2), padded_lse[:, :, : q.shape[1]].contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, heads = q.shape[1:3]
        q_BHQD, k_BHSD, v_BHSD = (_per_query_head(x, heads) for x in (q, k, v))
        square, bias = _efficient_mask(q, tile)
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
        return dq.transpose(1, 2), _per_key_head(dk, k), _per_key_head(dv, v)


def _flash_attn_package() -> Any:
    """flash_attn's interface module if the package is installed and loads; a broken one is named, never hidden."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        return importlib.import_module("flash_attn.flash_attn_interface")
    except (ImportError, OSError) as error:
        log.warning("flash-attn is installed but does not load; PyTorch's own flash kernel is used: %s", error)
        return None


def _flash_refuses(capability: Capability, q: Tensor, tile: Tile) -> str:
    size = q.shape[-1]
    if tile.keep_BQS is not None:
        return "no masks"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"no {q.dtype}"
    if size % 8 or size > 256:
        return "head size not a multiple of 8 up to 256"
    if capability < (8, 0):
        return "needs compute capability 8.0"
    # Shared memory of the consumer parts does not hold the backward's largest tiles (PyTorch's sdp_utils.cpp).
    if size > 192 and capability not in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return f"no backward for head size {size} on compute capability {capability[0]}.{capability[1]}"
    return ""


def _flash_attn_options(tile: Tile, scale: float) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": tile.causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _efficient_mask(q: Tensor, tile: Tile) -> tuple[bool, Tensor | None]:
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


def _per_query_head(x_BSHD: Tensor, heads: int) -> Tensor:
    """[B, H, S, D] with each key head repeated for its group of query heads."""
    group = heads // x_BSHD.shape[2]
    repeated = x_BSHD if group == 1 else x_BSHD.repeat_interleave(group, dim=2)
    return repeated.transpose(1, 2)


def _per_key_head(grad_BHSD: Tensor, x_BSKD: Tensor) -> Tensor:
    """Sum over each group of query heads, in fp32: [B, S, K, D] in x's dtype."""
    batch, _, keys, size = grad_BHSD.shape
    grouped = grad_BHSD.reshape(batch, x_BSKD.shape[2], -1, keys, size)
    return grouped.sum(2, dtype=torch.float32).transpose(1, 2).to(x_BSKD.dtype)
