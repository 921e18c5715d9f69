"""Where a fresh draft starts.

Shape letters: N draft vocabulary, H hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from torchspec.core.algorithms.eagle3.model import Eagle3Draft
from torchspec.core.interfaces.target import TargetHead

EARLIER_TAPS = 0.2
"""Standard deviation of the earlier taps' share of the first feature, over that of a plain initialisation."""


@torch.no_grad()
def initialise(draft: Eagle3Draft, head: TargetHead) -> None:
    """In place, from torch's global random state.

    Beside the usual random matrices: keys answer to the queries of their group, so a slot first looks at itself and
    at slots like it and not at everything alike; and where the sizes allow it, the first feature is the target's
    last tap and the head is the target's.
    """
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    geometry, attention = draft.geometry, draft.midlayer.self_attn
    group = geometry.num_attention_heads // geometry.num_key_value_heads
    queries = attention.q_proj.weight
    first_of_group = queries.view(-1, group, geometry.head_dim, queries.shape[1])[:, 0]
    attention.k_proj.weight.copy_(first_of_group.flatten(0, 1))
    if geometry.owns_embedding:
        nn.init.normal_(draft.embed_tokens.weight)
        return
    size = geometry.hidden_size
    draft.fc.weight[:, :-size].mul_(EARLIER_TAPS * geometry.num_taps**0.5)
    draft.fc.weight[:, -size:].copy_(torch.eye(size))
    draft.lm_head.weight.copy_(head.head_VH[draft.vocabulary.ids_N])
    # A norm of all ones is all ones, so the target's final norm answers with its weight.
    ones_1H = torch.full_like(head.head_VH[:1], 1.0)
    draft.norm.weight.copy_(head.normed(ones_1H, "pre_norm")[0])
