"""Conditional-on-distribution sampling (P-EAGLE, 2602.01469): at which anchors which depths are trained.

An element (a, j) is anchor a at depth j; it stands where slot a + j of depth 0 stands and predicts what that slot
predicts. Depth 0 keeps every position. With V the supervised slots of a document, n of them, depth j draws

    min(int((n - j) max(r^j, r_min)), |pool|)   of   pool = (the places a + j of depth j - 1's draw, + 1) & V

without replacement, every subset equally likely. So an anchor that is drawn at a depth was drawn at all depths before:
all that tells the sample is how deep each anchor goes. At a share of 1 nothing is drawn and the whole pool is kept.

Shape letters: B rows, T positions of the longest row, L positions of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.core.features.rows import PADDING, TokenRows


@dataclass(frozen=True, kw_only=True)
class DepthSampling:
    """K depths; r and r_min."""

    depths: int
    ratio: float
    least: float

    def share(self, depth: int) -> float:
        return max(self.ratio**depth, self.least)


def sample_rows(tokens: TokenRows, sampling: DepthSampling, draws: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(the deepest depth of each anchor, int64 [B, T]; positions of documents that kept every element, [B, T]).

    Documents beyond `draws` take the number 0. What is drawn of a document depends on nothing but its number and its
    own supervision.
    """
    valid_BT = supervised_slots(tokens)
    deepest_BT = torch.zeros_like(tokens.document_BT)
    whole_BT = torch.zeros_like(valid_BT)
    for row, document_T in enumerate(tokens.document_BT):
        for document in document_T.unique().tolist():
            if document == PADDING:
                continue
            here = document_T == document
            draw = draws[document] if document < len(draws) else 0
            deepest_BT[row, here], whole_BT[row, here] = sample_document(valid_BT[row, here], sampling, draw)
    return deepest_BT, whole_BT


def supervised_slots(tokens: TokenRows) -> Tensor:
    """[B, T]: slots whose token after next is supervised and of their own document."""
    valid_BT = torch.zeros_like(tokens.loss_mask_BT)
    document_BT = tokens.document_BT
    same_BT = (document_BT[:, 2:] == document_BT[:, :-2]) & (document_BT[:, :-2] != PADDING)
    valid_BT[:, :-2] = tokens.loss_mask_BT[:, 2:] & same_BT
    return valid_BT


def sample_document(valid_L: Tensor, sampling: DepthSampling, draw: int) -> tuple[Tensor, bool]:
    """(deepest depth of each anchor of one document, int64 [L]; whether every element was kept)."""
    generator = torch.Generator().manual_seed(draw)
    deepest_L = torch.zeros(valid_L.numel(), dtype=torch.int64)
    valid, kept_all = int(valid_L.sum()), True
    place = torch.arange(valid_L.numel())
    for depth in range(1, sampling.depths):
        pool = place + 1
        pool = pool[pool < valid_L.numel()]
        pool = pool[valid_L[pool]]
        share = sampling.share(depth)
        wanted = pool.numel() if share == 1 else max(0, int((valid - depth) * share))
        if wanted < pool.numel():
            pool = pool[torch.randperm(pool.numel(), generator=generator)[:wanted]]
            kept_all = False
        deepest_L[pool - depth] = depth
        place = pool
    return deepest_L, kept_all
