"""Where a fresh draft starts.

Shape letters: N draft vocabulary, H hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from torchspec.core.algorithms.eagle3.model import Eagle3Draft
from torchspec.core.interfaces.target import TargetHead


@torch.no_grad()
def initialise(draft: Eagle3Draft, head: TargetHead) -> None:
    """In place, from torch's global random state."""
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    if draft.geometry.owns_embedding:
        nn.init.normal_(draft.embed_tokens.weight)
        return
    draft.lm_head.weight.copy_(head.head_VH[draft.vocabulary.ids_N])
    # A norm of all ones is all ones, so the target's final norm answers with its weight.
    ones_1H = torch.full_like(head.head_VH[:1], 1.0)
    draft.norm.weight.copy_(head.normed(ones_1H, "pre_norm")[0])
