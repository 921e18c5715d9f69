"""Where a fresh draft of blocks starts.

Shape letters: H hidden size, D head size, C width of the reading key heads together, M some tokens.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from torchspec.core.algorithms.blocks.body import BlockDraft, BlockLayer
from torchspec.core.algorithms.blocks.geometry import BlockGeometry
from torchspec.core.algorithms.blocks.known_tokens import (
    normed_embeddings,
    normed_mask,
    slow_direction,
    token_direction,
)
from torchspec.core.interfaces.target import TargetHead

EARLIER_TAPS = 0.2
"""Standard deviation of the earlier taps' share of the context, over that of a plain initialisation."""

SHARPNESS = 1.5
"""Weight of the query norms: a head's score is at most SHARPNESS sqrt(D)."""

SOUGHT, PLAIN_KEY, PLAIN_QUERY = 1.5, 0.5, 0.3
"""Of a reading head: length of a token's key along what masks seek, over sqrt(D), and what is left of random maps."""

WRITTEN = 1.0
"""Root mean square of what a layer's heads add when they look at one slot alone."""

logger = logging.getLogger(__name__)


@torch.no_grad()
def initialise(draft: BlockDraft, head: TargetHead) -> None:
    """In place, from torch's global random state.

    Linear maps keep the size of what they read; what an MLP adds to the residual stream is scaled down by the number of
    layers that add (as in GPT-2). The final norm starts as the target's, whose head reads its output. The context is
    the target's last tap with a little of the others. Keys answer to the queries of their group, so a slot that knows a
    token looks at positions whose last tap resembles it, and what it looks at it writes down as it is. Half of the
    first layer's key heads read the anchor instead (see `_read_anchor`).
    """
    if draft.fc.weight.is_meta:
        return  # a draft of shapes alone
    for name, module in draft.named_modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            if name.endswith("down_proj"):
                std *= (2 * len(draft.layers)) ** -0.5
            nn.init.normal_(module.weight, std=std)
    # A norm of all ones is all ones, so the target's final norm answers with its weight.
    ones_1H = torch.full_like(head.embedding_VH[:1], 1.0)
    draft.norm.weight.copy_(head.normed(ones_1H, "pre_norm")[0])
    geometry, size = draft.geometry, draft.geometry.hidden_size
    draft.fc.weight[:, :-size].mul_(EARLIER_TAPS * geometry.num_taps**0.5)
    draft.fc.weight[:, -size:].copy_(torch.eye(size))
    for layer in draft.layers:
        assert isinstance(layer, BlockLayer)
        attention = layer.self_attn
        first_of_group = _grouped(attention.q_proj.weight, geometry)[:, 0]
        attention.k_proj.weight.copy_(first_of_group.flatten(0, 1))
        attention.q_norm.weight.fill_(SHARPNESS)
        values_CH = nn.init.orthogonal_(attention.v_proj.weight)
        share = min(1.0, len(values_CH) / size) ** 0.5
        attention.o_proj.weight.copy_(_repeated(values_CH * WRITTEN / share, geometry))
    _read_anchor(draft, head)


def _read_anchor(draft: BlockDraft, head: TargetHead) -> None:
    """Half of the first layer's key heads start where the mask slots look at the slot of the known token, and write its
    embedding into theirs.

    Their keys read the direction that tells tokens from the mask (`known_tokens.token_direction`), and the context is
    cleared of it, so that the anchor's key alone has the part that masks seek. It turns slowly, so the slots of a block
    find it as far as they reach. Values are the embeddings' first principal components.
    """
    geometry = draft.geometry
    size, width = geometry.hidden_size, geometry.head_dim
    reading = min((geometry.num_key_value_heads + 1) // 2, size // width)
    tokens_MH, mask_H = normed_embeddings(head), normed_mask(head, geometry.mask_token)
    told_H = token_direction(tokens_MH, mask_H)
    reason = ""
    if not reading:
        reason = "a head is wider than an embedding"
    elif told_H is None:
        reason = "the target's embeddings have no direction in common"
    if told_H is None or reason:
        logger.info("no head of the draft starts by reading the known token: %s", reason)
        return
    draft.fc.weight.sub_(torch.outer(told_H, told_H @ draft.fc.weight) / (told_H @ told_H))
    first = draft.layers[0]
    assert isinstance(first, BlockLayer)
    attention = first.self_attn
    query = _grouped(attention.q_proj.weight, geometry)
    group = query.shape[1]
    key = attention.k_proj.weight.view(-1, width, size)
    query[:reading].mul_(PLAIN_QUERY)
    key[:reading].mul_(PLAIN_KEY)
    for number in range(reading):
        sought_D = slow_direction(width)
        key[number] += SOUGHT * torch.outer(sought_D, told_H)
        query[number] += torch.outer(sought_D, mask_H) / (mask_H @ mask_H)
    components_HC = _components(tokens_MH, reading * width)
    attention.v_proj.weight[: reading * width] = components_HC.T
    # In directions of their own: along the embeddings, a tied head would have the anchor said again.
    written_CH = torch.linalg.qr(torch.randn(size, reading * width)).Q.T
    written_CH *= WRITTEN / (tokens_MH @ components_HC).square().sum(1).mean().div(size).sqrt()
    attention.o_proj.weight[:, : reading * group * width] = _repeated(written_CH, geometry)


def _components(tokens_MH: Tensor, count: int) -> Tensor:
    """[H, C]: orthonormal, the directions in which the tokens differ most."""
    vectors_HH: Tensor = torch.linalg.eigh(torch.cov(tokens_MH.T)).eigenvectors
    return vectors_HH[:, -count:]


def _grouped(weight: Tensor, geometry: BlockGeometry) -> Tensor:
    """[heads * D, in] -> [key heads, query heads per key head, D, in]."""
    group = geometry.num_attention_heads // geometry.num_key_value_heads
    return weight.view(-1, group, geometry.head_dim, weight.shape[1])


def _repeated(written_CH: Tensor, geometry: BlockGeometry) -> Tensor:
    """[H, heads * D]: what each number of these key heads' values writes, of every query head its share."""
    group = geometry.num_attention_heads // geometry.num_key_value_heads
    heads_XDH = written_CH.view(-1, geometry.head_dim, written_CH.shape[1]).repeat_interleave(group, 0)
    return heads_XDH.flatten(0, 1).T / group
