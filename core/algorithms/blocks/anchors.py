"""Where a micro-batch's blocks stand: positions drawn for each document from its number in `Moment.draws`.

Shape letters: B rows, T positions of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchspec.core.features.rows import PADDING, TokenRows


def eligible_anchors(tokens: TokenRows) -> Tensor:
    """[B, T]: positions whose own and next token are supervised and of one document."""
    mask_BT, document_BT = tokens.loss_mask_BT, tokens.document_BT
    eligible_BT = torch.zeros_like(mask_BT)
    same_BT = document_BT[:, 1:] == document_BT[:, :-1]
    eligible_BT[:, :-1] = mask_BT[:, :-1] & mask_BT[:, 1:] & same_BT & (document_BT[:, :-1] != PADDING)
    return eligible_BT


def draw_anchors(tokens: TokenRows, draws: Sequence[int], most: int) -> tuple[Tensor, Tensor]:
    """(the anchors, [B, T]; positions of documents of which every eligible one was taken, [B, T]).

    Of each document at most `most`, without replacement, every subset equally likely. Documents beyond `draws` take
    the number 0. What is drawn of a document depends on nothing but its number and its own supervision.
    """
    eligible_BT = eligible_anchors(tokens)
    chosen_BT, whole_BT = eligible_BT.clone(), tokens.document_BT != PADDING
    for document in torch.unique(tokens.document_BT).tolist():
        if document == PADDING:
            continue
        here_BT = tokens.document_BT == document
        row_E, place_E = (eligible_BT & here_BT).nonzero(as_tuple=True)
        if row_E.numel() <= most:
            continue
        draw = draws[document] if document < len(draws) else 0
        order_E = torch.randperm(row_E.numel(), generator=torch.Generator().manual_seed(draw))
        left_E = order_E[most:]
        chosen_BT[row_E[left_E], place_E[left_E]] = False
        whole_BT &= ~here_BT
    return chosen_BT, whole_BT
