"""A fresh draft starts from what the target knows already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.algorithms.eagle3.initialise import COPIED

Worlds = Callable[..., Any]


def fresh(world: Any) -> Any:
    """The world's own draft has its norms disturbed."""
    return world.algorithm.build_draft(world.draft.vocabulary, world.head).requires_grad_(False)


def test_it_starts_from_the_last_tap_and_the_targets_head(make_world: Worlds) -> None:
    world = make_world(ids_N=torch.arange(0, 300, 3), dtype=torch.float32)
    draft, head, size = fresh(world), world.head, world.algorithm.geometry.hidden_size
    assert torch.equal(draft.lm_head.weight, head.head_VH[::3])
    last_TH = torch.randn(5, size)
    torch.testing.assert_close(draft.fc(torch.cat((torch.zeros(5, 2 * size), last_TH), dim=1)), last_TH)
    assert float(draft.fc(torch.cat((torch.randn(5, 2 * size), torch.zeros(5, size)), dim=1)).std()) > 0.05
    last_TH = 3 * last_TH
    torch.testing.assert_close(draft.norm(last_TH, world.device.ops), head.normed(last_TH, "pre_norm"))


def test_with_norms_of_the_taps_it_starts_from_the_last_one_normed(make_world: Worlds) -> None:
    """Whatever the taps' sizes are; so it says what the target's head says of the last tap."""
    world = make_world(fc_norm=True, dtype=torch.float32)
    draft, head, size = fresh(world), world.head, world.algorithm.geometry.hidden_size
    draft.fc.weight[:, :-size] = 0
    taps_TNH = torch.tensor([3.0, 6.0, 10.0])[:, None] * torch.randn(5, 3, size)
    feature_TH = draft.features(taps_TNH.flatten(1)[None], world.device)[0]
    torch.testing.assert_close(feature_TH, torch.nn.functional.rms_norm(taps_TNH[:, -1], (size,), eps=1e-6))
    said_TV = draft.lm_head(draft.norm(feature_TH, world.device.ops))
    expected_TV = head.normed(taps_TNH[:, -1], "pre_norm") @ head.head_VH.T
    torch.testing.assert_close(said_TV, expected_TV, rtol=1e-3, atol=1e-3)


def test_each_key_answers_to_the_first_query_of_its_group(make_world: Worlds) -> None:
    """As it is, or, in the first half of the key heads, features to embeddings."""
    draft = fresh(make_world())
    geometry, attention = draft.geometry, draft.midlayer.self_attn
    size, group = geometry.head_dim, geometry.num_attention_heads // geometry.num_key_value_heads
    assert group > 1
    for head in range(geometry.num_key_value_heads):
        key = attention.k_proj.weight[head * size : (head + 1) * size]
        query = attention.q_proj.weight[head * group * size :][:size]
        if head < geometry.num_key_value_heads / 2:
            first, second = query.chunk(2, dim=1)
            assert not second.any()
            query = torch.cat((second, first), dim=1)
        assert torch.equal(key, query)
        assert not torch.equal(attention.q_proj.weight[(head * group + 1) * size :][:size], query)


def test_a_copying_head_finds_what_followed_the_current_token_and_repeats_it(make_world: Worlds) -> None:
    """Where a feature is the embedding of its token: what is looked at follows from the definition alone."""
    world = make_world(dtype=torch.float32)
    draft, head_VH = fresh(world), world.head.head_VH
    geometry, attention = draft.geometry, draft.midlayer.self_attn
    text_T, slots_TI = slots(world)
    width, group = geometry.head_dim, geometry.num_attention_heads // geometry.num_key_value_heads
    copying = (geometry.num_key_value_heads + 1) // 2
    queries_TQD, keys_TKD, values_TKD = (
        attention.heads(proj(slots_TI)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = queries_TQD[:, 0] @ keys_TKD[:, 0].T
    # The current token of query slot i is text[i + 1], whose own slot is i + 1.
    found = scores[:-1].argmax(dim=1) == torch.arange(1, scores.shape[0])
    assert float(found.float().mean()) > 0.8

    heads_THD = values_TKD.repeat_interleave(group, dim=1)
    heads_THD[:, copying * group :] = 0
    said_TH = attention.o_proj(heads_THD.flatten(1))
    torch.testing.assert_close(said_TH.square().mean().sqrt(), torch.tensor(COPIED), rtol=0.1, atol=0)
    logits_TV = said_TH @ torch.nn.functional.normalize(head_VH, dim=1).T
    rank_T = (logits_TV > logits_TV.gather(1, text_T[1:, None])).sum(1)
    assert width * copying < said_TH.shape[1]  # the heads see a part of an embedding
    assert float(rank_T.float().mean()) < 0.2 * head_VH.shape[0]


def slots(world: Any) -> tuple[Tensor, Tensor]:
    """A text of all tokens, and [next embedding ; feature] of each slot, where a feature is its token's embedding."""
    embedding_VH = world.head.embedding_VH
    text_T = torch.randperm(embedding_VH.shape[0], generator=torch.Generator().manual_seed(5))
    normed_VH = torch.nn.functional.rms_norm(embedding_VH, embedding_VH.shape[1:])
    return text_T, torch.cat((normed_VH[text_T[1:]], normed_VH[text_T[:-1]]), dim=1)


def latent_heads(world: Any, draft: Any, slots_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [T, heads, D] without rotation."""
    attention, ops = draft.midlayer.self_attn, world.device.ops
    parts = [slots_TI @ columns.T for columns in attention.input_columns(0, slots_TI.shape[1])]
    turns, tables = torch.zeros(len(slots_TI), dtype=torch.long), draft.rotary.tables(torch.zeros(1), torch.float32)
    query = attention.query(parts[0][None], turns[None], tables, ops)[0]
    key, value = (made[0] for made in attention.keys_values(*(p[None] for p in parts[1:]), turns[None], tables, ops))
    return query, key, value


def test_copying_heads_of_latent_attention_find_and_repeat_as_well(make_world: Worlds) -> None:
    sizes = {"kv_lora_rank": 96, "q_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 16}
    world = make_world(attention="mla", dtype=torch.float32, **sizes)
    draft, head_VH = fresh(world), world.head.head_VH
    copying = (draft.geometry.num_attention_heads + 1) // 2
    text_T, slots_TI = slots(world)
    queries, keys, values_THD = latent_heads(world, draft, slots_TI)
    for head in range(copying):
        found = (queries[:-1, head] @ keys[:, head].T).argmax(dim=1) == torch.arange(1, len(slots_TI))
        assert float(found.float().mean()) > 0.6, head
    values_THD[:, copying:] = 0
    said_TH = draft.midlayer.self_attn.add_output(torch.zeros(len(slots_TI), 64), values_THD, world.device.ops)
    torch.testing.assert_close(said_TH.square().mean().sqrt(), torch.tensor(COPIED), rtol=0.1, atol=0)
    logits_TV = said_TH @ torch.nn.functional.normalize(head_VH, dim=1).T
    rank_T = (logits_TV > logits_TV.gather(1, text_T[1:, None])).sum(1)
    assert float(rank_T.float().mean()) < 0.2 * head_VH.shape[0]


@pytest.mark.parametrize("options", [{}, {"kv_lora_rank": 3}, {"draft_config": {"hidden_size": 32}}], ids=str)
def test_other_heads_of_latent_attention_look_at_slots_like_theirs(make_world: Worlds, options: dict[str, Any]) -> None:
    """All of them where latents are too narrow to copy, or the draft is of another width."""
    world = make_world(attention="mla", dtype=torch.float32, qk_nope_head_dim=32, **options)
    draft = fresh(world)
    heads, size = draft.geometry.num_attention_heads, draft.geometry.hidden_size
    alike = range(heads) if options else range(heads // 2, heads)
    queries, keys, _ = latent_heads(world, draft, torch.randn(200, 2 * size))
    plain = slice(0, 32)
    for head in alike:
        scores = queries[:, head, plain] @ keys[:, head, plain].T
        own, others = scores.diagonal().mean(), scores[~torch.eye(200, dtype=torch.bool)]
        assert own > others.std(), head
        assert abs(float(others.mean())) < 0.3 * float(own), head


def test_a_draft_of_another_width_has_nothing_to_take_over(make_world: Worlds) -> None:
    draft = fresh(make_world(draft_config={"hidden_size": 32}))
    assert draft.fc.weight.shape[0] == 32
    assert float(draft.fc.weight.std()) > 0
    assert torch.equal(draft.norm.weight, torch.ones(32))


def test_a_head_wider_than_the_embedding_copies_nothing(make_world: Worlds) -> None:
    draft = fresh(make_world(draft_config={"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}))
    assert torch.equal(draft.midlayer.self_attn.k_proj.weight, draft.midlayer.self_attn.q_proj.weight[:128])
