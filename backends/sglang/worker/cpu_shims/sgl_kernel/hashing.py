"""The hash that turns a request's seed, a position and a token id into the noise of a draw, as an operator of torch."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_LIBRARY = torch.library.Library("sgl_kernel", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")  # type: ignore[no-untyped-call]


def murmur_hash32(seed_B: Tensor, positions_B: Tensor, columns_V: Tensor) -> Tensor:
    """uint32 [B, V]: MurmurHash3, x86 32 bit, of the 16 bytes seed, position, column.

    In int64, whose products wrap around and keep their low words.
    """
    seed_B = seed_B.view(torch.int64)
    blocks = (seed_B & _WORD, (seed_B >> 32) & _WORD, positions_B.long() & _WORD)
    h_BV = torch.zeros(len(seed_B), 1, dtype=torch.int64)
    for block_B in blocks:
        h_BV = _mixed(h_BV, block_B[:, None])
    h_BV = _mixed(h_BV, columns_V.long()[None] & _WORD) ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h_BV = ((h_BV ^ (h_BV >> shift)) * factor) & _WORD
    return (h_BV ^ (h_BV >> 16)).to(torch.uint32)


def _mixed(h: Tensor, block: Tensor) -> Tensor:
    block = (_rotated((block * 0xCC9E2D51) & _WORD, 15) * 0x1B873593) & _WORD
    return (_rotated(h ^ block, 13) * 5 + 0xE6546B64) & _WORD


def _rotated(word: Tensor, by: int) -> Tensor:
    return ((word << by) | (word >> (32 - by))) & _WORD


_LIBRARY.impl("murmur_hash32_cpu", murmur_hash32, "CPU")  # type: ignore[no-untyped-call]
