"""What a softmax over a vocabulary needs of each of its parts: the largest logit, the sum of exponentials, the first
choice.

A part's are [3, C]: the largest, sum exp(x - largest), and the index of its first occurrence, which fp32 holds exactly
below 2 ** 24. Of no columns: -inf, 0, 0.

Shape letters: C rows, N columns, P parts in the order of their columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.core.ops.extremes import first_max


def statistics(x_CN: Tensor, first: int = 0, *, keep: bool = True) -> Tensor:
    """Of columns that are numbered from `first`, [3, C]; x is overwritten if nobody is to `keep` it."""
    if not x_CN.shape[1]:
        none_C = x_CN.new_zeros(len(x_CN))
        return torch.stack((none_C - torch.inf, none_C, none_C))
    top_C, best_C = first_max(x_CN)
    less_CN = x_CN - top_C[:, None] if keep else x_CN.sub_(top_C[:, None])
    mass_C = less_CN.exp_().sum(-1)
    return torch.stack((top_C, mass_C, (best_C + first).to(x_CN.dtype)))


def merged(parts_P3C: Tensor) -> Tensor:
    """[P, ..., 3, C] -> [..., 3, C]: of all parts together; of equal first choices the earliest part's."""
    top_PC, mass_PC, best_PC = parts_P3C.unbind(-2)
    top_C, place_C = top_PC.max(0)
    mass_C = (mass_PC * (top_PC - top_C).exp()).sum(0)
    return torch.stack((top_C, mass_C, best_PC.gather(0, place_C[None])[0]), dim=-2)


def log_normaliser(parts_3C: Tensor) -> Tensor:
    """log sum exp, [C]."""
    return parts_3C[0] + parts_3C[1].log()
