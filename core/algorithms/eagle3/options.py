"""The `draft` section of an EAGLE-3 run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from torchspec.core.algorithms.starting import with_own_config
from torchspec.core.config.schema import Positive
from torchspec.core.objectives.terms import ObjectiveOptions


class Eagle3Options(ObjectiveOptions):
    config: Path | None = Field(
        None, description="a draft config.json to take the geometry from; default: that of `init_from`"
    )
    init_from: Path | None = Field(
        None, description="draft to start from: published (docs/checkpoints.md), exported, or a checkpoint"
    )
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

    @model_validator(mode="before")
    @classmethod
    def _of_the_start(cls, given: Any) -> Any:
        return with_own_config(given)

    @field_validator("config")
    @classmethod
    def _the_file(cls, config: Path | None) -> Path | None:
        """The file itself: checkpoints carry the files that options name, and compare them by their contents."""
        return config / "config.json" if config is not None and config.is_dir() else config
