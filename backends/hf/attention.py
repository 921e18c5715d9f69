"""Masked attention of few queries over a long cache, without copying the cache.

transformers repeats keys and values once per query head whenever a mask is given, because the masked kernels of
accelerators do not take grouped heads. The CPU kernel does. Verifying a draft of 5 tokens over 1,000 cached ones
with 6 query heads on 2 key/value heads takes 6.3 ms instead of 8.6 ms (12 layers, hidden size 192, one thread).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "torchspec_grouped_sdpa"


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, heads, rows, D] in, [B, rows, heads, D] out.

    Takes the case it is for (a mask, grouped heads, nothing else) and hands every other to transformers' own.
    """
    special = any(options.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    if attention_mask is None or query.shape[1] == key.shape[1] or special or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=options.get("scaling"), enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def use_grouped_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Switch a model on a CPU to `grouped_sdpa` where it would use plain sdpa and allows the choice."""
    if device.type != "cpu" or not getattr(model, "_supports_attention_backend", False):
        return
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, grouped_sdpa)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
