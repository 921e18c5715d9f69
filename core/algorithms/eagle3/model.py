"""The EAGLE-3 draft (2503.01840) and its training-time unroll. Parameter names are the published checkpoint's.

The forward pass of a micro-batch runs all K steps and hands the supervised slots' outputs to an objective *inside*
the call, so that whoever shards the parameters sees their every use within one `forward`.

Shape letters: B rows, T positions, Q running slots, K steps, M supervised pairs, F = taps x target hidden size,
H draft hidden size, Hq / Hk query / key-value heads, D head size, N draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec.core.algorithms.eagle3.batch import UnrollInputs
from torchspec.core.algorithms.eagle3.geometry import Geometry
from torchspec.core.attention.ttt import ttt_attention
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.layers import AttentionProjections, GatedMLP, RMSNorm

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, kw_only=True)
class StepTables:
    """cos and sin [B, rows, D] of one step's queries and of the keys it adds."""

    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class UnrollMemory:
    """Keys and values of the steps so far: [0] of every position under `mask`, the others one per running slot."""

    device: Device
    mask: MaskSpec
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class DraftLayer(nn.Module):
    """One Llama decoder layer whose attention reads [norm(embedding) ; norm(feature)], twice the hidden width."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        size, eps = geometry.hidden_size, geometry.rms_norm_eps
        self.norm_before_residual = geometry.norm_before_residual
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = AttentionProjections(
            2 * size, size, geometry.num_attention_heads, geometry.num_key_value_heads, geometry.head_dim
        )
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, geometry.intermediate_size)

    def forward(
        self, embedded: Tensor, feature: Tensor, slots_BQ: Tensor | None, tables: StepTables, memory: UnrollMemory
    ) -> Tensor:
        """The layer's output [B, Q, H] before the final norm; appends this step's keys to `memory`.

        At step 0 `embedded` and `feature` cover all T positions, and `slots_BQ` names those that go on; later they
        cover the Q running slots and `slots_BQ` is None.
        """
        ops = memory.device.ops
        normed = self.hidden_norm(feature, ops)
        both = torch.cat((self.input_layernorm(embedded, ops), normed), dim=-1)
        key, value = self.self_attn.keys_values(both)
        memory.keys.append(ops.rotary(key, *tables.key))
        memory.values.append(value)
        residual = normed if self.norm_before_residual else feature
        if slots_BQ is not None:
            both, residual = take_rows(both, slots_BQ), take_rows(residual, slots_BQ)
        query = ops.rotary(self.self_attn.queries(both), *tables.query)
        scale = self.self_attn.head_dim**-0.5
        mixed = ttt_attention(memory.device.attention, query, memory.keys, memory.values, memory.mask, scale)
        residual = residual + self.self_attn.output(mixed)
        out: Tensor = residual + self.mlp(self.post_attention_layernorm(residual, ops), ops)
        return out


class Eagle3Draft(nn.Module):
    """fc over the taps, one decoder layer, final norm, and a head over the draft vocabulary."""

    d2t: Tensor
    t2d: Tensor

    def __init__(self, geometry: Geometry, vocabulary: VocabularyMap) -> None:
        super().__init__()
        size = geometry.hidden_size
        self.geometry = geometry
        self.fc = nn.Linear(geometry.num_taps * geometry.target_hidden_size, size, bias=False)
        self.midlayer = DraftLayer(geometry)
        self.norm = RMSNorm(size, geometry.rms_norm_eps)
        self.lm_head = nn.Linear(size, vocabulary.size, bias=False)
        if geometry.owns_embedding:
            self.embed_tokens = nn.Embedding(geometry.vocab_size, size)
        self.register_buffer("d2t", vocabulary.d2t_N)
        self.register_buffer("t2d", vocabulary.t2d_V)
        self.rotary = geometry.rotary()

    @property
    def vocabulary(self) -> VocabularyMap:
        return VocabularyMap.from_offsets(self.d2t, self.geometry.vocab_size)

    def embedding(self, target_VH: Tensor) -> Tensor:
        """The embedding that the draft reads: its own, or the target's [V, H]."""
        return self.embed_tokens.weight if self.geometry.owns_embedding else target_VH

    def forward(
        self,
        inputs: UnrollInputs,
        embedding_VH: Tensor,
        steps: Sequence[Tensor],
        device: Device,
        objective: Callable[[Tensor, Tensor], Outcome],
    ) -> Outcome:
        """Unroll, then `objective(hidden_MH, head_NH)` on the normed outputs of the supervised pairs.

        `embedding_VH` is the target's; `steps[k]` holds the supervised slots of step k as indices into the
        flattened [B, Q]. The outcome should be a tuple or dict of tensors: sharding attaches its hooks to those.
        """
        weight = self.embedding(embedding_VH)
        outputs = self.unroll(inputs, weight, len(steps), device)
        chosen = [out.flatten(0, 1)[slots] for out, slots in zip(outputs, steps, strict=True)]
        return objective(self.norm(torch.cat(chosen), device.ops), self.lm_head.weight)

    def unroll(self, inputs: UnrollInputs, embedding: Tensor, steps: int, device: Device) -> list[Tensor]:
        """The layer's outputs [B, Q, H] of every step at the running slots, before the final norm."""
        dtype = self.fc.weight.dtype
        slots_BQ, last = inputs.slots_BQ, inputs.tokens_BT.shape[1] - 1
        own_BQ = inputs.position_BT.gather(1, slots_BQ)
        memory = UnrollMemory(device=device, mask=inputs.mask)
        feature = self.fc(inputs.taps_BTF.to(dtype))
        outputs: list[Tensor] = []
        for step in range(steps):
            query = self.rotary.tables(own_BQ + step, dtype)
            if step == 0:
                # Position T - 1 has no next token; no supervised slot sees the key made from this stand-in.
                tokens = torch.cat((inputs.tokens_BT[:, 1:], inputs.tokens_BT[:, -1:]), dim=1)
                tables = StepTables(query=query, key=self.rotary.tables(inputs.position_BT, dtype))
            else:
                tokens = inputs.tokens_BT.gather(1, (slots_BQ + 1 + step).clamp_max(last))
                tables = StepTables(query=query, key=query)
            embedded = F.embedding(tokens, embedding).to(dtype)
            feature = self.midlayer(embedded, feature, slots_BQ if step == 0 else None, tables, memory)
            outputs.append(feature)
        return outputs


def take_rows(x_BTX: Tensor, slots_BQ: Tensor) -> Tensor:
    """x at the given positions, [B, Q, X]."""
    return x_BTX.gather(1, slots_BQ[..., None].expand(-1, -1, x_BTX.shape[-1]))
