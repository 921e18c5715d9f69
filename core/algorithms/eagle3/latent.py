"""A draft layer with multi-head latent attention, for targets that have it (DeepSeek-V2, -V3, Kimi-K2): its sizes, and
the config.json in which engines look for them.

vLLM (`deepseek_eagle3.py`) and SGLang (`kimi_k25_eagle3.py`) read it as `Eagle3DeepseekV2ForCausalLM`. Both want a rank
of queries, and rotate adjacent pairs whatever the config says. The model_type is `deepseek_v2`: a draft that says
`deepseek_v3` is to vLLM a prediction head, and in one that says `kimi_k2`, as published ones do, it does not always see
latent attention (its issue 45760).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchspec.core.algorithms.eagle3.geometry import AttentionValues, Geometry
from torchspec.core.errors import Problem
from torchspec.core.export.draft_config import copy_field
from torchspec.core.models.geometry import Sources
from torchspec.core.models.latent import LATENT_SIZES, LatentAttention, LatentSizes, latent_rotary, latent_scale
from torchspec.core.models.layers import Rotary

MODEL_TYPE = "deepseek_v2"
GROUPED_ALONE = ("num_key_value_heads", "head_dim")
QUERY_RANKS = 3
"""Ranks of queries over those of keys, where the target compresses keys alone: as DeepSeek-V2 and -V3 have them."""


@dataclass(frozen=True, kw_only=True)
class LatentGeometry(Geometry):
    """`head_dim` is the width of a head as attention is computed: the wider of keys and values."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention: Literal["mla"] = "mla"

    @property
    def sizes(self) -> LatentSizes:
        return LatentSizes(**{name: getattr(self, name) for name in LATENT_SIZES})

    @property
    def attention_values(self) -> AttentionValues:
        """The latents are kept; and where heads have padding the output of attention a second time, without it.
        Gradients of q, k and v, and of the parts that they were made of, are there in a copy."""
        padded, parts = self.head_dim != self.v_head_dim, self.q_lora_rank + self.kv_lora_rank + self.qk_rope_head_dim
        return AttentionValues(
            parts=parts,
            queries=self.q_lora_rank + self.num_attention_heads * self.v_head_dim * padded,
            keys=self.kv_lora_rank,
            gradients=parts + 3 * self.num_attention_heads * self.head_dim,
        )

    def projections(self) -> LatentAttention:
        return LatentAttention(
            2 * self.hidden_size,
            self.hidden_size,
            self.num_attention_heads,
            self.sizes,
            self.rms_norm_eps,
            latent_scale(self.rope_parameters, self.sizes.qk_head_dim),
        )

    def rotary(self) -> Rotary:
        return latent_rotary(self.rope_parameters, self.qk_rope_head_dim, self.max_position_embeddings)


_USUAL = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def latent_fields(sources: Sources, heads: int) -> dict[str, Any]:
    """The fields of `LatentGeometry` that fix its attention; what is missing or of the other kind becomes a problem."""
    message = "is of draft.attention=gqa: here every head has its own keys, and draft.qk_nope_head_dim, "
    message += "draft.qk_rope_head_dim and draft.v_head_dim are what a head consists of"
    _refuse(sources, GROUPED_ALONE, message, "leave it out")
    known = dict(sources.target.latent_sizes or {})
    if "kv_lora_rank" in known:
        known.setdefault("q_lora_rank", QUERY_RANKS * known["kv_lora_rank"])
    fields = {name: sources.pick(name, known.get(name)) for name in LATENT_SIZES}
    for name in (name for name, size in fields.items() if size is None):
        message = f"the target ({sources.target.architecture}) does not say it"
        remedy = f"give it, such as draft.{name}={_USUAL[name]}, or leave draft.attention out"
        sources.problems.append(Problem(field=f"draft.{name}", value=None, message=message, remedy=remedy))
        fields[name] = _USUAL[name]
    return fields | {"num_key_value_heads": heads, "head_dim": LatentSizes(**fields).width}


def refuse_latent(sources: Sources) -> None:
    """Of a draft with grouped queries: sizes of the other kind would have no effect."""
    _refuse(sources, LATENT_SIZES, "is of draft.attention=mla", "draft.attention=mla, or leave it out")


def _refuse(sources: Sources, names: Sequence[str], message: str, remedy: str) -> None:
    for name in names:
        value = getattr(sources.options, name)
        if value is not None:
            sources.problems.append(Problem(field=f"draft.{name}", value=value, message=message, remedy=remedy))


def latent_problems(geometry: LatentGeometry) -> list[Problem]:
    """Everything for which no engine would serve such a layer, or would serve another."""
    problems, rope = [], geometry.rope_parameters
    if geometry.qk_rope_head_dim % 2:
        message = "must be even: rotary embedding turns pairs"
        problems.append(Problem(field="draft.qk_rope_head_dim", value=geometry.qk_rope_head_dim, message=message))
    if geometry.hidden_size % geometry.num_attention_heads:
        heads = geometry.num_attention_heads
        message = f"must divide the hidden size {geometry.hidden_size}, or transformers refuses engines the config"
        problems.append(Problem(field="draft.num_attention_heads", value=heads, message=message))
    if geometry.norm_before_residual:
        message = "SGLang reads no such flag with latent attention, and would serve the draft without it"
        problems.append(
            Problem(field="draft.norm_before_residual", value=True, message=message, remedy="train without it")
        )
    if geometry.norm_before_fc:
        message = "engines have no norm of all taps together with latent attention"
        problems.append(Problem(field="draft.norm_before_fc", value=True, message=message, remedy="draft.fc_norm=true"))
    if geometry.num_taps < 2:
        message = "SGLang hands a single tap to the layer as it is, past fc"
        problems.append(Problem(field="draft.taps", value=geometry.num_taps, message=message, remedy="tap two layers"))
    kind = rope.get("rope_type", "default")
    unread = sorted({"attention_factor", "truncate"} & rope.keys())
    missing = sorted({"factor", "original_max_position_embeddings"} - rope.keys()) if kind == "yarn" else []
    if kind not in ("default", "yarn"):
        reason = f"engines rotate latent attention plainly or by YaRN, not by {kind!r}"
    elif unread:
        reason = f"engines do not read {' and '.join(unread)} with latent attention"
    elif missing:
        reason = f"engines need {' and '.join(missing)} for YaRN"
    else:
        return problems
    remedy = "give a draft config.json with other rope_parameters"
    return [*problems, Problem(field="draft.config", value=rope, message=reason, remedy=remedy)]


def latent_layer(geometry: LatentGeometry, llama: Mapping[str, Any]) -> dict[str, Any]:
    """The layer's config, out of a Llama's of the same geometry. Its MLP is dense, as the first layers' are; `head_dim`
    is another thing there and follows from the rest."""
    shared = {name: value for name, value in llama.items() if name != "head_dim"}
    sizes = {name: getattr(geometry, name) for name in LATENT_SIZES}
    return {**shared, "model_type": MODEL_TYPE, **sizes, "rope_interleave": True, "first_k_dense_replace": 1}


def stated_fields(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LatentGeometry` that a config states, beside those of every layer. Raises ValueError."""
    if layer.get("rope_interleave") is False:
        raise ValueError("rope_interleave is False; engines rotate adjacent pairs of a draft with latent attention")
    fields: dict[str, Any] = {"attention": "mla"}
    for name in LATENT_SIZES:
        copy_field(fields, name, layer, int)
    if "q_lora_rank" not in fields and "kv_lora_rank" in fields:
        raise ValueError("it has no q_lora_rank, without which engines serve no draft with latent attention")
    return fields


def latent_notes(geometry: Geometry) -> tuple[str, ...]:
    """What people must know of engines' versions."""
    if not isinstance(geometry, LatentGeometry):
        return ()
    note = "SGLang serves drafts with latent attention since its change 24826 (May 2026)"
    if geometry.fc_norm:
        note += "; vLLM norms their taps since its change 43482 (May 2026)"
    if geometry.rope_parameters.get("rope_type", "default") == "default":
        note += "; vLLM those without YaRN since its change 51092 (August 2026): an older one fails to load it, or "
        note += "rotates by base 10000"
    return (note,)
