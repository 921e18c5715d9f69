"""The `draft` section of an EAGLE-3 run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from torchspec.core.algorithms.options import DraftOptions
from torchspec.core.config.schema import Positive


class Eagle3Options(DraftOptions):
    taps: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="target layers whose outputs feed the draft, 0-based; default: [1, n // 2 - 1, n - 4] of n"
    )
    vocab_size: Positive | None = Field(
        None,
        description="tokens of the draft vocabulary, those used most; default: min(32000, the target's)",
    )
    hidden_size: Positive | None = Field(None, description="hidden size of the draft; default: the target's")
    intermediate_size: Positive | None = Field(None, description="width of the draft's MLP; default: the target's")
    num_attention_heads: Positive | None = Field(None, description="query heads of the draft; default: the target's")
    num_key_value_heads: Positive | None = Field(
        None, description="gqa: key and value heads of the draft; default: the target's"
    )
    head_dim: Positive | None = Field(None, description="gqa: size of a head; default: the target's")
    attention: Literal["gqa", "mla"] | None = Field(
        None, description="gqa: grouped queries; mla: multi-head latent attention (DeepSeek-V2); default: gqa"
    )
    q_lora_rank: Positive | None = Field(
        None, description="mla: rank of the queries; default: the target's, or 3 kv_lora_rank"
    )
    kv_lora_rank: Positive | None = Field(None, description="mla: rank of the keys and values; default: the target's")
    qk_nope_head_dim: Positive | None = Field(
        None, description="mla: size of a head's part without positions; default: the target's"
    )
    qk_rope_head_dim: Positive | None = Field(
        None, description="mla: size of a head's rotary part; default: the target's"
    )
    v_head_dim: Positive | None = Field(None, description="mla: size of a head's values; default: the target's")
    norm_before_residual: bool = Field(False, description="the residual branch is the normed feature")
    unroll: Positive = Field(7, description="steps K of the unroll (training-time test)")
    step_decay: float = Field(0.8, gt=0, le=1, description="weight of step k is step_decay ** k")
