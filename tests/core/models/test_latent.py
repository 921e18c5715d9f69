"""Latent attention against transformers' DeepSeek-V3, which rotates adjacent pairs as its checkpoints want it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.models.latent import LatentAttention, LatentSizes, latent_rotary, latent_scale
from torchspec.core.registry import load_device

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 32}
ROPES = {
    "plain": PLAIN,
    "yarn": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, two strengths": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8, "beta_slow": 2},
    "yarn, no strengths": YARN,
}
SIZES = LatentSizes(q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
ROWS, SIZE, HEADS, EPS = 40, 32, 4, 1e-6


def theirs(x_BSH: Tensor, rope: dict[str, Any], state: dict[str, Tensor]) -> Tensor:
    config = DeepseekV3Config(
        hidden_size=SIZE,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=256,
        rope_parameters=rope,
        attn_implementation="eager",
        **vars(SIZES),
    )
    attention = DeepseekV3Attention(config, 0).double()
    attention.load_state_dict(state)
    tables = DeepseekV3RotaryEmbedding(config)(x_BSH, torch.arange(ROWS)[None])
    later = torch.full((ROWS, ROWS), -torch.inf, dtype=torch.float64).triu(1)
    # Their softmax is in fp32, whatever the precision.
    softmax = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype: softmax(x, dim=dim, dtype=torch.float64))
        out: Tensor = attention(x_BSH, tables, later[None, None])[0]
    return out


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_it_is_transformers_deepseek(rope: dict[str, Any]) -> None:
    torch.manual_seed(0)
    device, scale = load_device("cpu"), latent_scale(rope, SIZES.qk_head_dim)
    attention = LatentAttention(SIZE, SIZE, HEADS, SIZES, EPS, scale).double()
    for parameter in attention.parameters():
        parameter.data.uniform_(-0.4, 0.4)
    x_BSH = torch.randn(2, ROWS, SIZE, dtype=torch.float64)
    parts = [x_BSH @ columns.T for columns in attention.input_columns(0, SIZE)]
    turns = torch.arange(ROWS).expand(2, -1)
    tables = latent_rotary(rope, SIZES.qk_rope_head_dim, 256).tables(torch.arange(ROWS), torch.float64)
    query = attention.query(parts[0], turns, tables, device.ops)
    key, value = attention.keys_values(*parts[1:], turns, tables, device.ops)
    assert query.shape == key.shape == value.shape == (2, ROWS, HEADS, 24)
    mixed, _ = device.attention.forward(query, key, value, MaskSpec.causal(), attention.scale)
    got = attention.add_output(torch.zeros_like(x_BSH), mixed, device.ops)
    # Their tables are in fp32.
    torch.testing.assert_close(got, theirs(x_BSH, rope, attention.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("strengths", "turned", "scored"),
    [({"mscale": 0.7}, 1.0 + 0.07, 1.0), ({"mscale_all_dim": 0.5}, 1.1 / 1.05, 1.05**2), ({}, 1.1, 1.0)],
)
def test_where_a_strength_is_missing_it_is_as_engines_have_it(
    strengths: dict[str, float], turned: float, scored: float
) -> None:
    """vLLM's and SGLang's `deepseek_yarn`; transformers multiplies cos and sin by 1.1 in all three cases."""
    rope = {**YARN, "factor": torch.e, **strengths}
    assert latent_rotary(rope, 8, 256).attention_scaling == pytest.approx(turned, rel=1e-12)
    assert latent_scale(rope, 16) == pytest.approx(scored / 4, rel=1e-12)


@pytest.mark.parametrize(
    ("key", "value", "width"), [((128, 64), 128, 192), ((192, 64), 256, 256), ((128, 64), 256, 256), ((8, 4), 6, 16)]
)
def test_heads_hold_keys_and_values_and_are_multiples_of_eight(key: tuple[int, int], value: int, width: int) -> None:
    sizes = LatentSizes(
        q_lora_rank=1, kv_lora_rank=1, qk_nope_head_dim=key[0], qk_rope_head_dim=key[1], v_head_dim=value
    )
    assert sizes.width == width
