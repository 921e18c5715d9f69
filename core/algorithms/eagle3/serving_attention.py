"""The attention of a served draft as engines compute it, in plain float64 torch: Llama's, and latent attention.

The latter stands here as engines have it in decoding (SGLang `kimi_k25_eagle3.py` and `deepseek_v2.py`, vLLM
`deepseek_eagle3.py`): nothing is cached of a position but its latent and its rotated part, kv_b is absorbed into
queries and outputs, adjacent pairs are rotated as complex numbers, and YaRN is their `deepseek_yarn`.

Shape letters: T rows, S cached positions, Z = 2H inputs, Hq heads, C latent, N and R unrotated and rotated width of a
key, V width of a value.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb


class ServedAttention(ABC):
    """Reads a layer's config and the float64 tensors named in `tensors`, and keeps what it has seen."""

    tensors: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __init__(self, config: Mapping[str, Any], weight: Mapping[str, Tensor], place: torch.device) -> None: ...

    @abstractmethod
    def __call__(self, both_TZ: Tensor, start: int) -> Tensor:
        """What the layer adds to its residual stream, [T, H], at the positions `start`, `start` + 1, ..."""


class GroupedServed(ServedAttention):
    """Llama's."""

    tensors = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self, config: Mapping[str, Any], weight: Mapping[str, Tensor], place: torch.device) -> None:
        own = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
        self.config, self.weight = LlamaConfig(**own), weight
        self.rotary = LlamaRotaryEmbedding(self.config).to(place)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, both_TZ: Tensor, start: int) -> Tensor:
        rows, size, kv_heads = both_TZ.shape[0], self.config.head_dim, self.config.num_key_value_heads
        assert size is not None  # LlamaConfig fills both in
        assert kv_heads is not None
        q, k, v = (
            (both_TZ @ self.weight[f"{name}_proj.weight"].T).view(rows, -1, size).transpose(0, 1)[None]
            for name in "qkv"
        )
        positions = torch.arange(start, start + rows, device=both_TZ.device)[None]
        cos, sin = (table.double() for table in self.rotary(both_TZ, positions))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        self.keys.append(k)
        self.values.append(v)
        group = self.config.num_attention_heads // kv_heads
        keys = torch.cat(self.keys, dim=2).repeat_interleave(group, dim=1)
        values = torch.cat(self.values, dim=2).repeat_interleave(group, dim=1)
        scores = q @ keys.transpose(-1, -2) * size**-0.5
        later = torch.arange(keys.shape[2], device=scores.device)[None] > positions[0, :, None]
        out: Tensor = scores.masked_fill(later, float("-inf")).softmax(-1) @ values
        return out[0].transpose(0, 1).flatten(1) @ self.weight["o_proj.weight"].T


class LatentServed(ServedAttention):
    """DeepSeek's."""

    tensors = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")

    def __init__(self, config: Mapping[str, Any], weight: Mapping[str, Tensor], place: torch.device) -> None:
        self.weight, self.heads = weight, config["num_attention_heads"]
        self.plain, self.turning, self.value = (
            config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        self.rank, self.eps = config["kv_lora_rank"], float(config["rms_norm_eps"])
        both_HXC = weight["kv_b_proj.weight"].view(self.heads, self.plain + self.value, self.rank)
        self.of_keys_HNC, self.of_values_HVC = torch.split(both_HXC, [self.plain, self.value], dim=1)
        self.frequency_R, self.magnitude, self.scale = self._rotation(config["rope_parameters"], place)
        self.cached: list[Tensor] = []

    def _rotation(self, rope: Mapping[str, Any], place: torch.device) -> tuple[Tensor, float, float]:
        """Angle per position of each pair, the factor of cos and sin, and that of scores."""
        pair_R = torch.arange(0, self.turning, 2, dtype=torch.float64, device=place) / self.turning
        plain_R, scale = rope["rope_theta"] ** -pair_R, (self.plain + self.turning) ** -0.5
        if rope["rope_type"] == "default":
            return plain_R, 1.0, scale
        factor, limit = rope["factor"], rope["original_max_position_embeddings"]

        def dimension(turns: float) -> float:
            """Which pair turns so often within the original length."""
            return float(self.turning * math.log(limit / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"])))

        first = max(math.floor(dimension(rope.get("beta_fast", 32))), 0)
        last = min(math.ceil(dimension(rope.get("beta_slow", 1))), self.turning - 1)
        index_R = torch.arange(pair_R.numel(), dtype=torch.float64, device=place)
        stretched_R = ((index_R - first) / max(last - first, 0.001)).clamp(0, 1)

        def magnitude(strength: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

        deep = magnitude(rope.get("mscale_all_dim", 0))
        frequency_R = plain_R / factor * stretched_R + plain_R * (1 - stretched_R)
        return frequency_R, magnitude(rope.get("mscale", 1)) / deep, scale * deep**2

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight[f"{name}.weight"], self.eps)

    def _turned(self, x: Tensor, angle_TR: Tensor) -> Tensor:
        """Adjacent entries are real and imaginary part; [..., T, R]."""
        turn_TR = torch.polar(torch.full_like(angle_TR, self.magnitude), angle_TR)
        pairs = x.reshape(*x.shape[:-1], -1, 2).contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs) * turn_TR).flatten(-2)

    def __call__(self, both_TZ: Tensor, start: int) -> Tensor:
        rows = both_TZ.shape[0]
        position_T = torch.arange(start, start + rows, device=both_TZ.device)
        angle_TR = position_T[:, None] * self.frequency_R
        query = self._norm(both_TZ @ self.weight["q_a_proj.weight"].T, "q_a_layernorm")
        query_HTX = (query @ self.weight["q_b_proj.weight"].T).view(rows, self.heads, -1).transpose(0, 1)
        plain_HTN, turning_HTR = torch.split(query_HTX, [self.plain, self.turning], dim=-1)
        latent_TC, turning_TR = torch.split(
            both_TZ @ self.weight["kv_a_proj_with_mqa.weight"].T, [self.rank, self.turning], dim=-1
        )
        own = (self._norm(latent_TC, "kv_a_layernorm"), self._turned(turning_TR, angle_TR))
        self.cached.append(torch.cat(own, dim=-1))
        cached = torch.cat(self.cached)
        absorbed = torch.cat((plain_HTN @ self.of_keys_HNC, self._turned(turning_HTR, angle_TR)), dim=-1)
        scores_HTS = absorbed @ cached.T * self.scale
        later = torch.arange(len(cached), device=scores_HTS.device)[None] > position_T[:, None]
        mixed_HTC = scores_HTS.masked_fill(later, float("-inf")).softmax(-1) @ cached[:, : self.rank]
        out_HTV = mixed_HTC @ self.of_values_HVC.transpose(1, 2)
        out: Tensor = out_HTV.transpose(0, 1).flatten(1) @ self.weight["o_proj.weight"].T
        return out
