"""An EAGLE-3 training step the plain way: full masks, full score matrices, every logit kept, autograd throughout.

What most trainers do, written for reading; the measure of what the product's step saves.

Shape letters: B sequences, T slots, Z concatenated taps, H hidden size, N draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    unroll: int
    step_decay: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: input_ids_BT, loss_mask_BT (bool), taps_BTZ (concatenated), last_BTH after the final norm."""

    input_ids_BT: Tensor
    loss_mask_BT: Tensor
    taps_BTZ: Tensor
    last_BTH: Tensor


def step_loss(
    weights: Mapping[str, Tensor], shape: Shape, batch: Batch, embedding_VH: Tensor, head_VH: Tensor, ids_N: Tensor
) -> Tensor:
    """sum_k w_k CE_k / sum_k w_k n_k over counted slots (coverage `drop`)."""
    tokens, mask = batch.input_ids_BT, batch.loss_mask_BT
    length = tokens.shape[1]
    feature = F.linear(batch.taps_BTZ, weights["fc.weight"])
    logits_BTV = batch.last_BTH @ head_VH.T
    probs_BTN = logits_BTV[..., ids_N].softmax(-1)
    covered_BT = torch.isin(logits_BTV.argmax(-1), ids_N)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    numerator, denominator = torch.zeros(()), torch.zeros(())
    for k in range(shape.unroll):
        embedded = embedding_VH[_shift(tokens, k + 1)]
        feature = _layer(weights, shape, feature, embedded, k, keys, values)
        logits = F.linear(_norm(feature, weights["norm.weight"], shape.eps), weights["lm_head.weight"])
        slot = torch.arange(length)
        supervised = _shift(mask, k + 2) & (slot + k + 2 <= length - 1)
        counted = supervised & _shift(covered_BT, k + 1)
        cross = -(_shift(probs_BTN, k + 1) * logits.log_softmax(-1)).sum(-1)
        weight = shape.step_decay**k
        numerator = numerator + weight * cross[counted].sum()
        denominator = denominator + weight * counted.sum()
    return numerator / denominator.clamp_min(1)


def _shift(x: Tensor, count: int) -> Tensor:
    """Row i becomes row i + count; the tail is zero."""
    return torch.cat((x[:, count:], torch.zeros_like(x[:, :count])), dim=1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _layer(
    weights: Mapping[str, Tensor],
    shape: Shape,
    feature: Tensor,
    embedded: Tensor,
    k: int,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    def part(name: str) -> Tensor:
        return weights[f"midlayer.{name}.weight"]

    normed = _norm(feature, part("hidden_norm"), shape.eps)
    both = torch.cat((_norm(embedded, part("input_layernorm"), shape.eps), normed), dim=-1)
    x = feature + _attention(part, shape, both, k, keys, values)
    inner = _norm(x, part("post_attention_layernorm"), shape.eps)
    hidden = F.silu(F.linear(inner, part("mlp.gate_proj"))) * F.linear(inner, part("mlp.up_proj"))
    return x + F.linear(hidden, part("mlp.down_proj"))


def _attention(part, shape: Shape, both: Tensor, k: int, keys: list[Tensor], values: list[Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
    rows, length, _ = both.shape
    q, key, value = (
        F.linear(both, part(f"self_attn.{name}_proj")).view(rows, length, -1, shape.head_dim).transpose(1, 2)
        for name in "qkv"
    )
    q, key = (_rotate(x, k, shape.rope_theta) for x in (q, key))
    group = shape.heads // shape.kv_heads
    keys.append(key.repeat_interleave(group, 1))
    values.append(value.repeat_interleave(group, 1))
    slot = torch.arange(length)
    causal = slot[None] <= slot[:, None]
    allowed = torch.cat([causal, *[torch.eye(length, dtype=torch.bool)] * k], dim=1)
    scores = q @ torch.cat(keys, 2).transpose(-1, -2) * shape.head_dim**-0.5
    out = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ torch.cat(values, 2)
    return F.linear(out.transpose(1, 2).flatten(2), part("self_attn.o_proj"))


def _rotate(x: Tensor, k: int, theta: float) -> Tensor:
    size = x.shape[-1]
    frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = (torch.arange(x.shape[2], dtype=torch.float64) + k)[:, None] * frequency
    cos, sin = (torch.cat((table, table), -1).to(x.dtype) for table in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
