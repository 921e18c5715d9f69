"""Grouped heads for kernels that want a key head for each query head. Shape letters: B batch, S rows, H query heads,
K key heads, D head size."""

from __future__ import annotations

import torch
from torch import Tensor


def per_query_head(x_BSKD: Tensor, heads: int) -> Tensor:
    """[B, H, S, D] with each key head repeated for its group of query heads."""
    group = heads // x_BSKD.shape[2]
    repeated = x_BSKD if group == 1 else x_BSKD.repeat_interleave(group, dim=2)
    return repeated.transpose(1, 2)


def per_key_head(grad_BHSD: Tensor, x_BSKD: Tensor) -> Tensor:
    """Sum over each group of query heads, in fp32: [B, S, K, D] in x's dtype."""
    batch, _, keys, size = grad_BHSD.shape
    grouped = grad_BHSD.reshape(batch, x_BSKD.shape[2], -1, keys, size)
    return grouped.sum(2, dtype=torch.float32).transpose(1, 2).to(x_BSKD.dtype)
