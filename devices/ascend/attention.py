"""Attention on Ascend NPUs: the vendor's fused operator and its gradient, given tiles.

fp16, bf16 and fp32 with heads of up to 768 and up to 256 of them; what it does not take (fp64) runs as matrix products.
Sliding windows are one band, packed documents one call for up to 1,024 of them.

Shape letters: B batch, Q query rows, S key rows, T rows of all documents, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from torchspec.devices._math_kernel import MathKernel
from torchspec.devices._tiles import Tile, TileKinds
from torchspec.devices.ascend import _ops
from torchspec.devices.ascend._ops import Sparsity

log = logging.getLogger(__name__)

LARGEST_HEAD = 768
MOST_HEADS = 256
MOST_DOCUMENTS = 1024
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class AscendKernel:
    """`Kernel` by npu_fusion_attention."""

    def __init__(self) -> None:
        self._math = MathKernel()
        self._triangles: dict[torch.device, Tensor] = {}
        self._told: set[str] = set()

    def takes(self, q: Tensor) -> TileKinds:
        return self._math.takes(q) if self._refuses(q) else TileKinds(windows=True, documents=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        if self._refuses(q):
            return self._math.forward(q, k, v, tile, scale)
        if tile.row_cuts is None:
            out, largest, total = _ops.attention(q, k, v, scale, self._sparsity(tile, q))
            return out, (largest + total.log()).contiguous()
        parts = [
            _ops.attention(_packed(q[:, rows]), _packed(k[:, keys]), _packed(v[:, keys]), scale, sparsity)
            for rows, keys, sparsity in self._documents(tile, q)
        ]
        out = torch.cat([_unpacked(part, len(q)) for part, _, _ in parts], 1)
        lse_BQH = torch.cat([_unpacked(largest + total.log(), len(q)) for _, largest, total in parts], 1)
        return out, lse_BQH.transpose(1, 2).contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._refuses(q):
            return self._math.backward(dout, q, k, v, out, lse, tile, scale)
        if tile.row_cuts is None:
            return _ops.attention_backward(dout, q, k, v, out, lse, scale, self._sparsity(tile, q))
        lse_BQH = lse.transpose(1, 2)
        parts = []
        for rows, keys, sparsity in self._documents(tile, q):
            of_rows = [_packed(x[:, rows]) for x in (dout, q, out, lse_BQH)]
            packed_k, packed_v = _packed(k[:, keys]), _packed(v[:, keys])
            packed_dout, packed_q, packed_out, packed_lse = of_rows
            grads = _ops.attention_backward(
                packed_dout, packed_q, packed_k, packed_v, packed_out, packed_lse, scale, sparsity
            )
            parts.append([_unpacked(grad, len(q)) for grad in grads])
        dq, dk, dv = (torch.cat(grads, 1) for grads in zip(*parts, strict=True))
        return dq, dk, dv

    def _refuses(self, q: Tensor) -> bool:
        heads, size = q.shape[-2:]
        if q.dtype in _DTYPES and size <= LARGEST_HEAD and heads <= MOST_HEADS:
            return False
        case = f"attention of {q.dtype}, {heads} heads of size {size}"
        if case not in self._told:
            self._told.add(case)
            log.info("%s runs as matrix products: the fused operator does not take it", case)
        return True

    def _sparsity(self, tile: Tile, q: Tensor) -> Sparsity:
        if tile.keep_BQS is not None:
            hidden = (~tile.keep_BQS[:, None]).contiguous()
            return Sparsity(hidden=hidden, mode=_ops.FULL_MASK, rows_without_keys=tile.may_have_empty_rows)
        if not tile.causal:
            return Sparsity()
        if tile.window is None:
            return Sparsity(hidden=self._triangle(q.device), mode=_ops.CAUSAL_LOWER_RIGHT)
        return Sparsity(hidden=self._triangle(q.device), mode=_ops.BAND, before=tile.window - 1)

    def _documents(self, tile: Tile, q: Tensor) -> Iterator[tuple[slice, slice, Sparsity]]:
        """(rows, keys, sparsity) of as many documents as one call takes; those of a batch are its rows' one by one."""
        like = self._sparsity(tile, q)
        documents = list(tile.documents())
        at_once = max(1, MOST_DOCUMENTS // len(q))
        for first in range(0, len(documents), at_once):
            part = documents[first : first + at_once]
            rows, keys = (slice(part[0][axis].start, part[-1][axis].stop) for axis in (0, 1))
            row_ends, key_ends = (
                list(accumulate([each[axis].stop - each[axis].start for each in part] * len(q))) for axis in (0, 1)
            )
            sparsity = Sparsity(
                hidden=like.hidden, mode=like.mode, before=like.before, row_ends=row_ends, key_ends=key_ends
            )
            yield rows, keys, sparsity

    def _triangle(self, device: torch.device) -> Tensor:
        if device not in self._triangles:
            ones = torch.ones(_ops.COMPRESSED, _ops.COMPRESSED, dtype=torch.bool, device=device)
            self._triangles[device] = ones.triu_(1)
        return self._triangles[device]


def _packed(x_BQHD: Tensor) -> Tensor:
    """[B, Q, ...] -> [T, ...]."""
    return x_BQHD.flatten(0, 1)


def _unpacked(x_THD: Tensor, batch: int) -> Tensor:
    return x_THD.unflatten(0, (batch, -1))  # type: ignore[no-untyped-call,no-any-return]
