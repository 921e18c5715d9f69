"""Operations of a target's forward pass over a text, from the shapes of its tensors and its configuration.

A matrix that a token passes costs it 2 operations a weight. Of experts it passes those that its router chooses. Not
passed are the embedding, which is looked up, the output head, which no capture needs, and what sees images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_spec import load_target_config
from torchspec.core.models.target_weights import TargetWeights

NOT_PASSED = re.compile(r"embed|lm_head|vision|visual|multi_modal|mm_projector|conv1d|(^|\.)mtp\.")
EXPERTS = re.compile(r"\.experts\.")
CHOSEN_NAMES = ("num_experts_per_tok", "top_k_experts", "experts_per_token", "moe_topk")
COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, kw_only=True)
class TargetCost:
    """active       weights of matrices that a token passes
    attention    operations for each pair of a token and one that it sees, of a layer with softmax attention
    full, local  how many such layers see all tokens before, and only the last `window`
    """

    active: int
    attention: float
    full: int
    local: int = 0
    window: int = 0

    def flops(self, length: int) -> float:
        """Of a text of so many tokens."""
        near = min(length, self.window)
        local = near * (near + 1) / 2 + (length - near) * near
        pairs = self.full * length * (length + 1) / 2 + self.local * local
        return 2.0 * self.active * length + self.attention * pairs


def target_cost(spec: TargetSpec, weights: TargetWeights) -> TargetCost:
    """Raises TargetError when the configuration cannot be read."""
    config = load_target_config(spec.path, trust_remote_code=spec.trust_remote_code).get_text_config(decoder=True)
    chosen, count = _first(config, CHOSEN_NAMES), _first(config, COUNT_NAMES)
    share = chosen / count if chosen and count else 1.0
    active = 0.0
    for name in weights.files:
        shape = weights.shape(name)
        if len(shape) > 1 and not NOT_PASSED.search(name):
            active += prod(shape) * (share if EXPERTS.search(name) else 1.0)
    full, local, window = _layers(config, spec.num_layers)
    return TargetCost(active=int(active), attention=_attention(spec), full=full, local=local, window=window)


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these fields that holds a number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _layers(config: Any, layers: int) -> tuple[int, int, int]:
    """(layers whose tokens see all before them, those that see a window, its tokens); linear attention is neither."""
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * layers)
    window = _first(config, ("sliding_window", "attention_chunk_size")) or 0
    local = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds) if window else 0
    linear = sum(kind == "linear_attention" for kind in kinds)
    return len(kinds) - local - linear, local, window


def _attention(spec: TargetSpec) -> float:
    """Two products a pair: queries with keys, and weights with values."""
    sizes = spec.latent_sizes or {}
    if "v_head_dim" in sizes and "qk_nope_head_dim" in sizes:
        keys = sizes["qk_nope_head_dim"] + sizes.get("qk_rope_head_dim", 0)
        return 2.0 * spec.num_attention_heads * (keys + sizes["v_head_dim"])
    return 4.0 * spec.num_attention_heads * spec.head_dim
