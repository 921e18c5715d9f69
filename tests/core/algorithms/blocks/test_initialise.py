"""A fresh draft starts from what the target knows already, and reads the token that is known."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.algorithms.blocks.initialise import WRITTEN, initialise
from torchspec.core.interfaces.target import TargetHead

Worlds = Callable[..., Any]


def shared_direction(head: TargetHead) -> TargetHead:
    """The head of a target whose embeddings have something in common, as trained ones do."""
    generator = torch.Generator().manual_seed(3)
    size = head.embedding_VH.shape
    embedding_VH = torch.randn(size, generator=generator) + torch.randn(size[1:], generator=generator)
    return replace(head, embedding_VH=0.02 * embedding_VH)  # type: ignore[type-var]


def fresh(world: Any, head: TargetHead) -> Any:
    """The world's own draft has its norms disturbed."""
    torch.manual_seed(4)
    return world.algorithm.build_draft(world.draft.vocabulary, head).requires_grad_(False)


def normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


@pytest.mark.parametrize("kind", ["dflash", "dspark", "domino"])
def test_masks_look_at_the_token_that_is_known(make_world: Worlds, kind: str) -> None:
    """Of the anchor, the masks, and thirty positions of context: by the definition of attention, without rotation,
    which turns what they seek by little."""
    world = make_world(kind, dtype=torch.float32, head_dim=16)
    head = shared_direction(world.head)
    draft = fresh(world, head)
    geometry, attention = draft.geometry, draft.layers[0].self_attn
    width, group = geometry.head_dim, geometry.num_attention_heads // geometry.num_key_value_heads
    reading = (geometry.num_key_value_heads + 1) // 2
    mask_H = normed(head.embedding_VH[geometry.mask_token])
    context_TH = normed(torch.randn(30, geometry.num_taps * 64) @ draft.fc.weight.T)
    query_QD = normed((attention.q_proj.weight @ mask_H).view(-1, width)) * attention.q_norm.weight
    shares = []
    for token in range(0, 200, 10):
        slots_SH = torch.stack([normed(head.embedding_VH[token]), mask_H, mask_H, mask_H, *context_TH])
        keys_SKD = normed((slots_SH @ attention.k_proj.weight.T).view(len(slots_SH), -1, width))
        scores_QS = torch.einsum("qd,sqd->qs", query_QD, keys_SKD.repeat_interleave(group, 1)) * width**-0.5
        shares.append(scores_QS.softmax(-1)[: reading * group, 0])
    assert float(torch.stack(shares).mean()) > 0.5 > 10 / 34


def test_a_reading_head_writes_what_tells_the_token(make_world: Worlds) -> None:
    """With a known size, and not along its embedding: a tied head would have the anchor said again."""
    world = make_world(dtype=torch.float32)
    head = shared_direction(world.head)
    attention, size = fresh(world, head).layers[0].self_attn, 64
    read = world.algorithm.geometry.head_dim * ((world.algorithm.geometry.num_key_value_heads + 1) // 2)
    tokens_VH = normed(head.embedding_VH)
    values_VKD = attention.heads(tokens_VH @ attention.v_proj.weight.T)
    repeated = values_VKD.repeat_interleave(attention.o_proj.weight.shape[1] // (values_VKD[0].numel()), dim=1).flatten(
        1
    )
    repeated[:, repeated.shape[1] * read // values_VKD[0].numel() :] = 0
    written_VH = repeated @ attention.o_proj.weight.T
    assert float(written_VH.square().mean().sqrt()) == pytest.approx(WRITTEN, rel=0.05)
    # Tokens stay as far apart as their first principal components are.
    centred_VH = tokens_VH - tokens_VH.mean(0)
    kept = torch.linalg.eigvalsh(torch.cov(centred_VH.T))[-read:].sum() / torch.cov(centred_VH.T).trace()
    apart = (written_VH - written_VH.mean(0)).square().sum() / written_VH.square().sum()
    components_VH = tokens_VH @ torch.linalg.eigh(torch.cov(tokens_VH.T)).eigenvectors[:, -read:]
    expected = (components_VH - components_VH.mean(0)).square().sum() / components_VH.square().sum()
    assert float(kept) > 0.3
    torch.testing.assert_close(apart, expected, rtol=1e-3, atol=0)
    assert abs(float(F.cosine_similarity(written_VH, tokens_VH).mean())) < 0.3
    assert size > read


def test_other_heads_write_down_what_they_look_at(make_world: Worlds) -> None:
    """A slot or a position of context, seen through as many dimensions as there are, and of a known size."""
    world = make_world(dtype=torch.float32)
    attention = fresh(world, shared_direction(world.head)).layers[1].self_attn
    seen_TH = torch.randn(200, 64)
    values_TKD = attention.heads(seen_TH @ attention.v_proj.weight.T)
    repeated = values_TKD.repeat_interleave(attention.o_proj.weight.shape[1] // values_TKD[0].numel(), dim=1)
    written_TH = repeated.flatten(1) @ attention.o_proj.weight.T
    assert float(written_TH.square().mean().sqrt()) == pytest.approx(WRITTEN, rel=0.05)
    dimensions = values_TKD[0].numel()
    expected = (dimensions / 64) ** 0.5
    assert float(F.cosine_similarity(written_TH, seen_TH).mean()) == pytest.approx(expected, abs=0.03)


def test_the_context_is_the_last_tap_with_a_little_of_the_others(make_world: Worlds) -> None:
    """But for one direction, which the reading heads go by."""
    world = make_world(dtype=torch.float32)
    draft = fresh(world, shared_direction(world.head))
    last_VH, others_VH = draft.fc.weight[:, -64:], draft.fc.weight[:, :-64]
    cleared = torch.linalg.svdvals(last_VH)
    torch.testing.assert_close(cleared, torch.cat((torch.ones(63), torch.zeros(1))), rtol=0, atol=1e-5)
    said_TH = torch.randn(50, others_VH.shape[1]) @ others_VH.T
    assert 0.1 < float(said_TH.square().mean().sqrt()) < 0.6


def test_embeddings_that_share_nothing_are_told_of(make_world: Worlds, caplog: pytest.LogCaptureFixture) -> None:
    world = make_world(dtype=torch.float32)
    draft = fresh(world, world.head)
    with caplog.at_level(logging.INFO):
        initialise(draft, world.head)
    assert "no direction in common" in caplog.text
    attention = draft.layers[0].self_attn
    assert torch.equal(attention.k_proj.weight[:16], attention.q_proj.weight[:16])
    assert torch.equal(draft.fc.weight[:, -64:], torch.eye(64))


def test_a_head_wider_than_the_embedding_reads_nothing(make_world: Worlds, caplog: pytest.LogCaptureFixture) -> None:
    world = make_world(dtype=torch.float32, head_dim=128)
    with caplog.at_level(logging.INFO):
        fresh(world, shared_direction(world.head))
    assert "wider than an embedding" in caplog.text
