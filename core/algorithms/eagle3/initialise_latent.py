"""Where latent attention starts, with the aims that `initialise` has for grouped queries: keys answer to queries, and
half of the heads copy. There it is done by rows of maps, here by places in the latents that the maps go through.

Shape letters: H hidden size, C rank of the keys' latent, Q of the queries', M shared places, F places that know tokens,
E places that hold what is copied, N unrotated width of a key, V width of a value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchspec.core.models.latent import LatentAttention

KNOWN = 4
"""The part of the keys' latent, one over this, that knows tokens, and that holds what is copied."""


def answer(attention: LatentAttention) -> None:
    """Each head's unrotated key is its query, as far as the two latents have places in common."""
    _answer(attention, slice(0, None), 0, 0)


def copy(attention: LatentAttention, size: int, head_of_embedding: Callable[[], Tensor], strength: float) -> None:
    """Of queries' latents the first F places read the embedding, as those of keys read the feature; the next E of keys
    hold directions of the embedding. The first half of the heads see nothing else: they look where the current token is
    a feature and repeat what they find, with a root mean square of `strength`. The other heads' keys answer to
    their queries by the places that are left.

    `size` is that of embedding and feature, `head_of_embedding` [H, H] maps one to logits' rows.
    """
    sizes, (q_a, kv_a) = attention.sizes, (attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight)
    query_HXQ, both_HXC = _by_head(attention)
    heads = len(query_HXQ)
    copying = (heads + 1) // 2
    known = min(sizes.kv_lora_rank // KNOWN, sizes.q_lora_rank)
    held = min(sizes.kv_lora_rank // KNOWN, copying * sizes.v_head_dim, size)
    if not known * held:
        return  # latents too narrow for both
    map_FH = nn.init.normal_(torch.empty(known, size), std=size**-0.5)
    directions_EH = torch.linalg.qr(torch.randn(size, held)).Q.T
    q_a[:known] = torch.cat((map_FH, torch.zeros_like(map_FH)), dim=1)  # [embedding ; feature]
    kv_a[:known] = torch.cat((torch.zeros_like(map_FH), map_FH), dim=1)
    kv_a[known : known + held] = torch.cat((directions_EH, torch.zeros_like(directions_EH)), dim=1)
    _answer(attention, slice(copying, None), known, known + held)

    plain = sizes.qk_nope_head_dim
    query_HXQ[:copying], both_HXC[:copying] = 0, 0
    match_HNF = nn.init.normal_(torch.empty(copying, plain, known), std=known**-0.5)
    query_HXQ[:copying, :plain, :known] = match_HNF
    both_HXC[:copying, :plain, :known] = match_HNF
    place_P = torch.arange(copying * sizes.v_head_dim) % held
    picked_PE = nn.functional.one_hot(place_P, held).to(both_HXC.dtype)
    both_HXC[:copying, plain:, known : known + held] = picked_PE.view(copying, -1, held)
    raised_EH = directions_EH @ head_of_embedding()
    # A direction is repeated by several values, whose outputs add up.
    raised_EH *= strength * (size / held) ** 0.5 * held / len(place_P)
    attention.o_proj.weight[:, : len(place_P)] = raised_EH[place_P].T


def _answer(attention: LatentAttention, heads: slice, queries_from: int, keys_from: int) -> None:
    """Of these heads, by the places of the latents from there on."""
    sizes = attention.sizes
    shared = min(sizes.q_lora_rank - queries_from, sizes.kv_lora_rank - keys_from)
    of_queries, of_keys = slice(queries_from, queries_from + shared), slice(keys_from, keys_from + shared)
    attention.kv_a_proj_with_mqa.weight[of_keys] = attention.q_a_proj.weight[of_queries]
    query_HXQ, both_HXC = _by_head(attention)
    plain = sizes.qk_nope_head_dim
    both_HXC[heads, :plain] = 0
    both_HXC[heads, :plain, of_keys] = query_HXQ[heads, :plain, of_queries]


def _by_head(attention: LatentAttention) -> tuple[Tensor, Tensor]:
    """Views of q_b [heads, unrotated and rotated width, Q] and of kv_b [heads, unrotated width and values, C]."""
    sizes = attention.sizes
    query_HXQ = attention.q_b_proj.weight.view(-1, sizes.qk_head_dim, sizes.q_lora_rank)
    both_HXC = attention.kv_b_proj.weight.view(len(query_HXQ), -1, sizes.kv_lora_rank)
    return query_HXQ, both_HXC
