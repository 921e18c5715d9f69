"""Where a fresh draft starts.

Shape letters: N draft vocabulary, H hidden size, D head size, C width of the copying key heads together,
M some tokens.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec.core.algorithms.eagle3 import initialise_latent
from torchspec.core.algorithms.eagle3.geometry import Geometry
from torchspec.core.algorithms.eagle3.model import Eagle3Draft
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.models.latent import LatentAttention
from torchspec.core.models.layers import AttentionProjections

EARLIER_TAPS = 0.2
"""Standard deviation of the earlier taps' share of the first feature, over that of a plain initialisation."""

COPIED = 6.0
"""Root mean square of what a copying head adds when it looks at one slot alone.

On the embedded target, whose last tap has 10, anything from 2 to 14 learns to copy; without, it is learned late.
Where taps are normed the first feature has 1, and a short training with 6 was no worse than one with 0.6.
"""

FITTED_TOKENS, RIDGE = 4, 1e-3
"""Of the map from embeddings to head rows: tokens per hidden unit it is fitted to, and its regularisation."""


@torch.no_grad()
def initialise(draft: Eagle3Draft, head: TargetHead) -> None:
    """In place, from torch's global random state.

    Beside the usual random matrices: keys answer to the queries of their group, so a slot first looks at slots like
    it and not at everything alike; and where the sizes allow it, the first feature is the target's last tap (normed,
    where the draft norms its taps), the head is the target's, and half of the key heads copy (see `_copy`).
    """
    if draft.fc.weight.is_meta:
        return  # a draft of shapes alone
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    geometry, attention = draft.geometry, draft.midlayer.self_attn
    if isinstance(attention, LatentAttention):
        initialise_latent.answer(attention)
    else:
        first_of_group = _grouped(attention.q_proj.weight, geometry)[:, 0]
        attention.k_proj.weight.copy_(first_of_group.flatten(0, 1))
    if geometry.owns_embedding:
        nn.init.normal_(draft.embed_tokens.weight)
        return
    size = geometry.hidden_size
    draft.fc.weight[:, :-size].mul_(EARLIER_TAPS * geometry.num_taps**0.5)
    draft.fc.weight[:, -size:].copy_(torch.eye(size))
    draft.lm_head.weight.copy_(head.rows(draft.vocabulary.ids_N))
    # A norm of all ones is all ones, so the target's final norm answers with its weight.
    ones_1H = torch.full_like(head.embedding_VH[:1], 1.0)
    draft.norm.weight.copy_(head.normed(ones_1H, "pre_norm")[0])
    if isinstance(attention, LatentAttention):
        initialise_latent.copy(attention, size, partial(_head_of_embedding, draft, head), COPIED)
    else:
        _copy(draft, attention, head)


def _copy(draft: Eagle3Draft, attention: AttentionProjections, head: TargetHead) -> None:
    """Half of the key heads start as the induction heads of 2209.11895, which text needs and training finds late.

    A slot holds a token's feature and the *next* token's embedding. So the slot that says what followed an earlier
    occurrence of the current token is the one whose feature knows that token: keys read features as queries read
    embeddings. What such a head has looked at, it repeats: its values are the slot's embedding, and its output raises
    the logit of that token, by a linear map fitted from embeddings to head rows.
    """
    geometry = draft.geometry
    size, width = geometry.hidden_size, geometry.head_dim
    copying = min((geometry.num_key_value_heads + 1) // 2, size // width)
    if not copying:
        return  # a head wider than the embedding
    queries = _grouped(attention.q_proj.weight, geometry)[:copying, 0]
    queries[..., size:] = 0  # [embedding ; feature]
    attention.k_proj.weight[: copying * width] = queries.roll(size, dims=-1).flatten(0, 1)
    directions_HC = torch.linalg.qr(torch.randn(size, copying * width)).Q
    attention.v_proj.weight[: copying * width] = torch.cat((directions_HC.T, torch.zeros_like(directions_HC.T)), dim=1)
    raised_CH = directions_HC.T @ _head_of_embedding(draft, head)
    group = geometry.num_attention_heads // geometry.num_key_value_heads
    # Over the group's heads the outputs add up, over a normed embedding they have this root mean square.
    raised_CH *= COPIED / group * (size / (copying * width)) ** 0.5
    repeated = raised_CH.view(copying, 1, width, size).expand(-1, group, -1, -1)
    attention.o_proj.weight[:, : copying * group * width] = repeated.flatten(0, 2).T


def _head_of_embedding(draft: Eagle3Draft, head: TargetHead) -> Tensor:
    """[H, H]: normed embedding -> head row of the same token, least squares; scaled to keep lengths on average."""
    size = draft.geometry.hidden_size
    ids_N = draft.vocabulary.ids_N
    some = ids_N[:: max(1, ids_N.numel() // (FITTED_TOKENS * size))]
    rows_MH = head.embedding_VH[some.to(head.embedding_VH.device)]  # the draft is still on the host
    embedding_MH = F.rms_norm(rows_MH.float().cpu(), (size,))
    products_HH = embedding_MH.T @ embedding_MH
    # Where there are too few tokens to tell, the smallest map.
    products_HH.diagonal().add_(RIDGE * products_HH.diagonal().mean())
    fitted_HH = torch.linalg.solve(products_HH, embedding_MH.T @ head.rows(some).float().cpu())
    scaled_HH: Tensor = fitted_HH * (size**0.5 / fitted_HH.norm().clamp_min(1e-20))
    return scaled_HH


def _grouped(weight: Tensor, geometry: Geometry) -> Tensor:
    """[heads * D, in] -> [key heads, query heads per key head, D, in]."""
    group = geometry.num_attention_heads // geometry.num_key_value_heads
    return weight.view(-1, group, geometry.head_dim, weight.shape[1])
