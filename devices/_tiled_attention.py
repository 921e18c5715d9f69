"""The device contract's attention, built from a kernel that knows only full, causal and small masked tiles.

The kernel is the part that differs between devices; slicing, rows without keys and the sums over tiles are here, once.

Shape letters: B batch, Q query rows, S key rows, H query heads, D head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from torchspec.core.ops.lse import merge
from torchspec.devices._tiles import EVERY_ROW, Tile, TileKinds, tiles
from torchspec.devices.api import MaskSpec


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps and of sums over tiles: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Kernel(Protocol):
    """Attention of one tile. q, k, v, dout and out are [B, rows, heads, D] with a last stride of 1; query heads a
    multiple of key heads.

    Results for rows without keys are overwritten by the caller; the kernel must only not fail on them.
    """

    def takes(self, q: Tensor) -> TileKinds:
        """Which tiles it is given, beside the three that every kernel takes, for queries of this dtype and size."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        """-> out like q, lse contiguous [B, H, Q] in `statistics_dtype`."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class TiledAttention:
    """Implements `Attention` over a `Kernel`."""

    def __init__(self, kernel: Kernel, *, temporary_bytes: int) -> None:
        self._kernel = kernel
        self.temporary_bytes = temporary_bytes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> tuple[Tensor, Tensor]:
        kernel = self._kernel
        queries = q.shape[1]
        q, k, v = _last_stride_one(q), _last_stride_one(k), _last_stride_one(v)
        out = lse = None
        for tile in tiles(mask, queries, k.shape[1], q.device, kernel.takes(q)):
            part, part_lse = kernel.forward(*_operands(tile, q, k, v), tile, scale)
            if tile.may_have_empty_rows:
                part, part_lse = _clear_empty_rows(part, part_lse, tile)
            if tile.batch == EVERY_ROW and tile.rows == slice(0, queries) and not tile.shares_rows:
                return part, part_lse
            if out is None or lse is None:
                out, lse = _without_keys(q)
            rows = (tile.batch, tile.rows)
            lse_rows = (tile.batch, slice(None), tile.rows)
            if tile.shares_rows:
                part, part_lse = merge(out[rows], lse[lse_rows], part, part_lse)
            out[rows], lse[lse_rows] = part, part_lse
        return _without_keys(q) if out is None or lse is None else (out, lse)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: MaskSpec,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernel = self._kernel
        q, k, v = _last_stride_one(q), _last_stride_one(k), _last_stride_one(v)
        dout, out = _last_stride_one(dout.to(q.dtype)), _last_stride_one(out.to(q.dtype))
        # A row without any key has lse -inf; its masked scores are -inf too, and -inf - -inf is not a number.
        lse_filled = lse.masked_fill(lse == -torch.inf, 0.0)
        wide = statistics_dtype(q.dtype)
        dq = dk = dv = None
        for tile in tiles(mask, q.shape[1], k.shape[1], q.device, kernel.takes(q)):
            q_tile, k_tile, v_tile = _operands(tile, q, k, v)
            rows = (tile.batch, tile.rows)
            dq_tile, dk_tile, dv_tile = kernel.backward(
                dout[rows], q_tile, k_tile, v_tile, out[rows], lse_filled[tile.batch, :, tile.rows], tile, scale
            )
            if q_tile is q and k_tile is k:
                return dq_tile, dk_tile, dv_tile
            if dq is None or dk is None or dv is None:
                dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
            dq[rows] += dq_tile
            dk[tile.batch, tile.keys] += dk_tile
            dv[tile.batch, tile.keys] += dv_tile
        if dq is None or dk is None or dv is None:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _operands(tile: Tile, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tile's slices, or the tensors themselves where it covers them: a decoding step feels every slicing."""
    whole_batch = tile.batch == EVERY_ROW
    if not (whole_batch and tile.rows == slice(0, q.shape[1])):
        q = q[tile.batch, tile.rows]
    if not (whole_batch and tile.keys == slice(0, k.shape[1])):
        k, v = k[tile.batch, tile.keys], v[tile.batch, tile.keys]
    return q, k, v


def _clear_empty_rows(out: Tensor, lse: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    assert tile.keep_BQS is not None
    empty_BQ = ~tile.keep_BQS.any(-1)
    return out.masked_fill(empty_BQ[..., None, None], 0.0), lse.masked_fill(empty_BQ[:, None], -torch.inf)


def _without_keys(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    lse = q.new_full((batch, heads, queries), -torch.inf, dtype=statistics_dtype(q.dtype))
    return q.new_zeros(q.shape), lse
