"""First largest entry of each row, faster than torch's on a CPU, where finding the index is not vectorised.

Shape letters: C rows, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 128


def first_max(x_CN: Tensor) -> tuple[Tensor, Tensor]:
    """(value [C], index [C] of its first occurrence): the largest of each block, then the place within one block."""
    whole = x_CN.shape[1] // _BLOCK * _BLOCK
    if x_CN.device.type != "cpu" or whole <= _BLOCK:
        return x_CN.max(-1)
    blocks_CJB: Tensor = x_CN[:, :whole].unflatten(-1, (-1, _BLOCK))  # type: ignore[no-untyped-call]
    top_C, block_C = blocks_CJB.amax(-1).max(-1)
    inner_CB = blocks_CJB.gather(1, block_C[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
    index_C = block_C * _BLOCK + inner_CB.max(-1).indices
    if whole == x_CN.shape[1]:
        return top_C, index_C
    rest_C, rest_index_C = x_CN[:, whole:].max(-1)
    return torch.maximum(top_C, rest_C), torch.where(rest_C > top_C, whole + rest_index_C, index_C)
