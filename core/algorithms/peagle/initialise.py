"""Where a fresh draft starts."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from torchspec.core.algorithms.eagle3.initialise import initialise as initialise_first_layer
from torchspec.core.algorithms.peagle.model import PEagleDraft
from torchspec.core.interfaces.target import TargetHead


@torch.no_grad()
def initialise(draft: PEagleDraft, head: TargetHead) -> None:
    """In place, from torch's global random state.

    fc, the first layer, norm and head start as EAGLE-3's do; the other layers add nothing yet, so that the draft starts
    as one of a single layer. The feature of what is to be drafted is random: none is the right one.
    """
    if draft.fc.weight.is_meta:
        return  # a draft of shapes alone
    # It looks at these parts of a draft, which have the same names here.
    initialise_first_layer(cast(Any, draft), head)
    nn.init.normal_(draft.mask_hidden)
    for layer in draft.every_layer():
        if not layer.first:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
