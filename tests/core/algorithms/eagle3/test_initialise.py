"""A fresh draft starts from what the target knows already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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


def test_each_key_answers_to_the_first_query_of_its_group(make_world: Worlds) -> None:
    world = make_world()
    geometry, attention = world.algorithm.geometry, world.draft.midlayer.self_attn
    size, group = geometry.head_dim, geometry.num_attention_heads // geometry.num_key_value_heads
    assert group > 1
    for head in range(geometry.num_key_value_heads):
        key = attention.k_proj.weight[head * size : (head + 1) * size]
        query = attention.q_proj.weight[head * group * size :][:size]
        assert torch.equal(key, query)
        assert not torch.equal(attention.q_proj.weight[(head * group + 1) * size :][:size], query)


def test_a_draft_of_another_width_has_nothing_to_take_over(make_world: Worlds) -> None:
    draft = fresh(make_world(draft_config={"hidden_size": 32}))
    assert draft.fc.weight.shape[0] == 32
    assert float(draft.fc.weight.std()) > 0
    assert torch.equal(draft.norm.weight, torch.ones(32))
