"""Where a fresh draft of blocks starts."""

from __future__ import annotations

import torch
from torch import nn

from torchspec.core.algorithms.blocks.body import BlockDraft
from torchspec.core.interfaces.target import TargetHead


@torch.no_grad()
def initialise(draft: BlockDraft, head: TargetHead) -> None:
    """In place, from torch's global random state.

    Linear maps keep the size of what they read; what a layer adds to the residual stream is scaled down by the number
    of layers that add (as in GPT-2). The final norm starts as the target's, whose head reads its output.
    """
    if draft.fc.weight.is_meta:
        return  # a draft of shapes alone
    for name, module in draft.named_modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            if name.endswith(("o_proj", "down_proj")):
                std *= (2 * len(draft.layers)) ** -0.5
            nn.init.normal_(module.weight, std=std)
    # A norm of all ones is all ones, so the target's final norm answers with its weight.
    ones_1H = torch.full_like(head.embedding_VH[:1], 1.0)
    draft.norm.weight.copy_(head.normed(ones_1H, "pre_norm")[0])
