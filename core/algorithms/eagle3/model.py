"""The EAGLE-3 draft (2503.01840) and its training-time unroll. Parameter names are the published checkpoint's.

The forward pass of a micro-batch runs all K steps and hands their outputs to an objective *inside* the call, so that
whoever shards the parameters sees their every use within one `forward`.

What the steps share is computed once: fc over the taps, the rotary tables, and the embeddings' share of q, k and v,
which is one product over T + K tokens instead of K products over T: step k reads it k rows further on.

Shape letters: B rows, T positions, X = T + K tokens, Q running slots, K steps, F = taps x target hidden size,
H draft hidden size, Z width of q, k or v, Hq / Hk query / key-value heads, D head size, P angles of the tables,
V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchspec.core.algorithms.eagle3.batch import UnrollInputs
from torchspec.core.algorithms.eagle3.geometry import Geometry
from torchspec.core.attention.ttt import ttt_attention
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models import fused
from torchspec.core.models.layers import AttentionProjections, GatedMLP, RMSNorm
from torchspec.core.objectives.distillation import Head

Outcome = TypeVar("Outcome")
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every step of a micro-batch reads.

    shares_BXZ    the embeddings' share of q, k and v at every token
    maps_ZH       the maps of q, k and v that read the feature
    tables_PD     cos and sin of every angle
    """

    inputs: UnrollInputs
    device: Device
    shares_BXZ: QKV
    maps_ZH: QKV
    tables_PD: tuple[Tensor, Tensor]


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
        self, step: int, feature: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shared: Shared
    ) -> QKV:
        """(output [B, Q, H] before the final norm, this step's key and value).

        `feature` covers all T positions at step 0, whose keys are [B, T, Hk, D], and the Q running slots later.
        """
        ops, slots = shared.device.ops, shared.inputs.slots
        running = feature
        if step == 0 and not slots.whole:
            # Only keys are wanted of the slots that don't run.
            running = slots.take(feature)
            after = (share_BXZ[:, 1 : 1 + feature.shape[1]] for share_BXZ in shared.shares_BXZ[1:])
            kv = self.hidden_norm.then(feature, shared.maps_ZH[1:], ops, tuple(after))
            own = slots.take(shared.shares_BXZ[0], 1)
            qkv = (*self.hidden_norm.then(running, shared.maps_ZH[:1], ops, (own,)), *kv)
        else:
            own_BQZ = [slots.take(share_BXZ, 1 + step) for share_BXZ in shared.shares_BXZ]
            qkv = self.hidden_norm.then(feature, shared.maps_ZH, ops, own_BQZ)
        query, key, value = (self.self_attn.heads(part) for part in qkv)
        inputs = shared.inputs
        query = fused.rotate(query, inputs.own_BQ + step, shared.tables_PD, ops)
        key = fused.rotate(key, inputs.own_BQ + step if step else inputs.position_BT, shared.tables_PD, ops)
        mixed = ttt_attention(
            shared.device.attention,
            query,
            [*keys, key],
            [*values, value],
            inputs.mask,
            self.self_attn.head_dim**-0.5,
        )
        residual = self.hidden_norm(running, ops) if self.norm_before_residual else running
        residual = self.self_attn.add_output(residual, mixed)
        return self.mlp(residual, self.post_attention_layernorm, ops), key, value


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
        self._map: tuple[Tensor, int, VocabularyMap] | None = None

    @property
    def vocabulary(self) -> VocabularyMap:
        """The map that `d2t` says, made anew only when the buffer changed: its host copy is kept between steps."""
        if self._map is None or self._map[0] is not self.d2t or self._map[1] != self.d2t._version:
            vocabulary = VocabularyMap.from_offsets(self.d2t, self.geometry.vocab_size)
            self._map = (self.d2t, self.d2t._version, vocabulary)
        return self._map[2]

    def embedding(self, target_VH: Tensor) -> Tensor:
        """The embedding that the draft reads: its own, or the target's [V, H]."""
        return self.embed_tokens.weight if self.geometry.owns_embedding else target_VH

    def forward(
        self,
        inputs: UnrollInputs,
        embedding_VH: Tensor,
        steps: int,
        device: Device,
        objective: Callable[[list[Tensor], Head], Outcome],
        *,
        recompute: bool = False,
    ) -> Outcome:
        """Unroll, then `objective(outputs, head)`; `outputs[k]` [B * Q, H] are the running slots' before the norm.

        `embedding_VH` is the target's. With `recompute` the layer's activations are made again in the backward pass.
        The outcome should be a tuple or dict of tensors: sharding attaches its hooks to those.
        """
        outputs = self.unroll(inputs, self.embedding(embedding_VH), steps, device, recompute=recompute)
        head = Head(norm_H=self.norm.weight, head_NH=self.lm_head.weight, eps=self.norm.eps)
        return objective([output.flatten(0, 1) for output in outputs], head)

    def unroll(
        self, inputs: UnrollInputs, embedding_VH: Tensor, steps: int, device: Device, *, recompute: bool = False
    ) -> list[Tensor]:
        """The layer's outputs [B, Q, H] of every step at the running slots, before the final norm."""
        shared = self._shared(inputs, embedding_VH, device)
        feature = self.fc(inputs.taps_BTF.to(self.fc.weight.dtype))
        outputs: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step in range(steps):
            given = (step, feature, tuple(keys), tuple(values), shared)
            if recompute and torch.is_grad_enabled():
                # Nothing here draws random numbers.
                feature, key, value = checkpoint(self.midlayer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                feature, key, value = self.midlayer(*given)
            outputs.append(feature)
            keys.append(key)
            values.append(value)
        return outputs

    def _shared(self, inputs: UnrollInputs, embedding_VH: Tensor, device: Device) -> Shared:
        layer, dtype, size = self.midlayer, self.fc.weight.dtype, self.geometry.hidden_size
        # Cut once per micro-batch: the steps' gradients meet in the cut before they are widened again.
        embedding_maps = layer.self_attn.input_columns(0, size)
        embedded_BXH = F.embedding(inputs.tokens_BX, embedding_VH).to(dtype)
        shares = layer.input_layernorm.then(embedded_BXH, embedding_maps, device.ops)
        angles_P = torch.arange(inputs.angles, device=inputs.tokens_BX.device)
        return Shared(
            inputs=inputs,
            device=device,
            shares_BXZ=shares,  # type: ignore[arg-type]
            maps_ZH=layer.self_attn.input_columns(size, 2 * size),
            tables_PD=self.rotary.tables(angles_P, dtype),
        )


def vocabulary_of(draft: nn.Module) -> VocabularyMap:
    """Of a draft that may be wrapped or sharded: `Eagle3Draft.vocabulary`."""
    assert isinstance(draft, Eagle3Draft)
    return draft.vocabulary
