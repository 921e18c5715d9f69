"""A multi-token-prediction head and its training-time unroll (FastMTP, 2509.18362, after EAGLE's training-time test).

Slot i holds the target's hidden state at position i. Its step k reads token x_{i+1+k} and the state h_k:

    x = proj([norm_e(embed(token)) ; norm_h(h_k)]),  out_k = layer(x),  h_{k+1} = out_k or its final norm

Step 0's keys are seen by all later slots of the document, those of a slot's own later steps by itself alone: what
decoding computes when the head is applied to its own output with its key/value cache. Embedding and output head are
the target's, frozen.

The forward pass of a micro-batch runs all K steps and hands their outputs to an objective *inside* the call, so that
whoever shards the parameters sees their every use within one `forward`. The embeddings' share of x is one product over
all tokens, which step k reads k rows further on; step 0's keys and values are made first and `spread` once.

Shape letters: B rows, S slots of this rank, X tokens that they read, Q running slots, K steps, H hidden size, D head
size, A angles of the tables, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchspec.core.algorithms.eagle3.batch import UnrollInputs
from torchspec.core.algorithms.mtp.geometry import Geometry
from torchspec.core.attention.forms import AttentionForm, attention_form
from torchspec.core.attention.ttt import ttt_attention
from torchspec.core.interfaces.device import Device, FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models import fused
from torchspec.core.models.layers import AttentionProjections, GatedMLP, LinearMap, RMSNorm
from torchspec.core.objectives.chunks import ShardLogits
from torchspec.core.objectives.distillation import Head
from torchspec.core.objectives.frozen import FrozenHead

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every step of a micro-batch reads.

    form          how this rank's queries meet all keys
    share_BXH     the embeddings' share of proj's output, at every token
    tables_AD     cos and sin of every angle
    """

    inputs: UnrollInputs
    device: Device
    form: AttentionForm
    share_BXH: Tensor
    tables_AD: tuple[Tensor, Tensor]


class Attention(AttentionProjections):
    """Projections with biases (Qwen2) or with a norm over every head of queries and keys (Qwen3), or with neither."""

    def __init__(self, geometry: Geometry) -> None:
        size, width, eps = geometry.hidden_size, geometry.head_dim, geometry.rms_norm_eps
        super().__init__(size, size, geometry.num_attention_heads, geometry.num_key_value_heads, width)
        if geometry.qkv_bias:
            for proj in (self.q_proj, self.k_proj, self.v_proj):
                proj.bias = nn.Parameter(torch.zeros(proj.out_features))
        self.q_norm = RMSNorm(width, eps) if geometry.qk_norm else None
        self.k_norm = RMSNorm(width, eps) if geometry.qk_norm else None

    def project(self, x: Tensor, norm: RMSNorm, parts: str, ops: FusedOps) -> list[Tensor]:
        """q, k or v [..., heads, D], those named in `parts`, of the norm of x; not yet rotated."""
        projs: list[nn.Linear] = [getattr(self, f"{part}_proj") for part in parts]
        norms = {"q": self.q_norm, "k": self.k_norm}
        out = []
        for part, proj, made in zip(parts, projs, norm.then(x, [p.weight for p in projs], ops), strict=True):
            heads = self.heads(made if proj.bias is None else made + proj.bias)
            own_norm = norms.get(part)
            out.append(heads if own_norm is None else own_norm(heads, ops))
        return out


class DecoderLayer(nn.Module):
    """One dense decoder layer with grouped queries, as Llama, Qwen2 and Qwen3 have it."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        size, eps = geometry.hidden_size, geometry.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(geometry)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, geometry.intermediate_size)

    def first_keys(self, x_BSH: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Step 0's keys and values of every slot, as `shared.form.attention` reads them."""
        inputs, ops = shared.inputs, shared.device.ops
        key, value = self.self_attn.project(x_BSH, self.input_layernorm, "kv", ops)
        return shared.form.spread(fused.rotate(key, inputs.turn_BS, shared.tables_AD, ops), value)

    def forward(self, step: int, shared: Shared, x_BQH: Tensor, *keys_values: Tensor) -> tuple[Tensor, ...]:
        """(output [B, Q, H], and after step 0 this step's key and value).

        `keys_values` are the keys, then the values, of the steps before, step 0's as `first_keys` left them.
        """
        inputs, ops = shared.inputs, shared.device.ops
        before = len(keys_values) // 2
        keys, values = keys_values[:before], keys_values[before:]
        query, *rest = self.self_attn.project(x_BQH, self.input_layernorm, "qkv" if step else "q", ops)
        query = fused.rotate(query, inputs.own_BQ + step, shared.tables_AD, ops)
        written: tuple[Tensor, ...] = ()
        if rest:
            key, value = rest
            written = (fused.rotate(key, inputs.own_BQ + step, shared.tables_AD, ops), value)
            keys, values = (*keys, written[0]), (*values, written[1])
        scale = self.self_attn.head_dim**-0.5
        mixed = ttt_attention(shared.form.attention, query, keys, values, inputs.mask, scale)
        return self.mlp(self.self_attn.add_output(x_BQH, mixed, ops), self.post_attention_layernorm, ops), *written


class MtpDraft(nn.Module):
    """Two norms, a projection of what they norm, one decoder layer, final norm. `input_proj` keeps the checkpoint's
    order of columns."""

    ids_V: Tensor

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        size, eps = geometry.hidden_size, geometry.rms_norm_eps
        self.geometry = geometry
        self.token_norm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.input_proj = LinearMap(2 * size, size)
        self.layer = DecoderLayer(geometry)
        self.norm = RMSNorm(size, eps)
        self.rotary = geometry.rotary()
        self.register_buffer("ids_V", torch.arange(geometry.vocab_size), persistent=False)
        self.target_rows = FrozenHead()
        self._map: VocabularyMap | None = None

    @property
    def vocabulary(self) -> VocabularyMap:
        """The whole of the target's."""
        if self._map is None or self._map.ids_N is not self.ids_V:
            self._map = VocabularyMap(ids_N=self.ids_V, target_size=self.geometry.vocab_size)
        return self._map

    @property
    def token_columns(self) -> Tensor:
        """[H, H]: the part of proj that reads embeddings."""
        return self.input_proj.weight.chunk(2, dim=1)[0 if self.geometry.rules.embedding_first else 1]

    @property
    def hidden_columns(self) -> Tensor:
        """[H, H]: the part of proj that reads hidden states."""
        return self.input_proj.weight.chunk(2, dim=1)[1 if self.geometry.rules.embedding_first else 0]

    def forward(
        self,
        inputs: UnrollInputs,
        target: TargetHead,
        steps: int,
        device: Device,
        objective: Callable[[list[Tensor], Head], Outcome],
        *,
        shard_logits: ShardLogits = "tokens",
        recompute: bool = False,
    ) -> Outcome:
        """Unroll, then `objective(outputs, head)`; `outputs[k]` [B * Q, H] are the running slots' before the norm.

        `inputs.taps_BSF` are the target's hidden states that the family's step 0 reads. With `recompute` the steps'
        activations are made again in the backward pass. The outcome should be a tuple or dict of tensors: sharding
        attaches its hooks to those.
        """
        outputs = self.unroll(inputs, target.embedding_VH, steps, device, recompute=recompute)
        # Here, where the parameters have the precision that is computed in.
        rows_VH, is_part = self.target_rows.rows(target, self.vocabulary, self.norm.weight.dtype, shard_logits)
        head = Head(norm_H=self.norm.weight, head_NH=rows_VH, eps=self.norm.eps, is_part=is_part)
        return objective([output.flatten(0, 1) for output in outputs], head)

    def unroll(
        self, inputs: UnrollInputs, embedding_VH: Tensor, steps: int, device: Device, *, recompute: bool = False
    ) -> list[Tensor]:
        """The layer's outputs [B, Q, H] of every step at the running slots, before the final norm."""
        weight = self.input_proj.weight
        shared = self._shared(inputs, embedding_VH, device)
        state_BSH = inputs.taps_BSF.to(device=weight.device, dtype=weight.dtype)
        x_BSH = self._joined(state_BSH, self._first_share(shared), device.ops)
        # Made and exchanged outside what is run again: they are kept in any case.
        key, value = self.layer.first_keys(x_BSH, shared)
        feature = inputs.slots.take(x_BSH)
        outputs: list[Tensor] = []
        keys, values = [key], [value]
        for step in range(steps):
            given = (feature, *keys, *values)
            if recompute and torch.is_grad_enabled():
                # Nothing here draws random numbers. Tensors are arguments of their own, so that hooks on what is kept
                # for the backward pass see them.
                made = checkpoint(self._step, step, shared, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                made = self._step(step, shared, *given)
            feature, *own = made
            outputs.append(feature)
            if own:
                keys.append(own[0])
                values.append(own[1])
        return outputs

    def _step(self, step: int, shared: Shared, feature_BQH: Tensor, *keys_values: Tensor) -> tuple[Tensor, ...]:
        """Step 0 is given proj's output, made for the keys already; later ones the output of the step before."""
        if step:
            ops = shared.device.ops
            state = self.norm(feature_BQH, ops) if self.geometry.rules.feeds_normed else feature_BQH
            feature_BQH = self._joined(state, shared.inputs.slots.take(shared.share_BXH, 1 + step), ops)
        outputs: tuple[Tensor, ...] = self.layer(step, shared, feature_BQH, *keys_values)
        return outputs

    def _joined(self, state: Tensor, share: Tensor, ops: FusedOps) -> Tensor:
        """proj of the two normed inputs, of which the embeddings' share is made already."""
        (x,) = self.hidden_norm.then(state, (self.hidden_columns,), ops, (share,))
        return x

    def _first_share(self, shared: Shared) -> Tensor:
        """Of step 0 at every slot, [B, S, H]."""
        inputs = shared.inputs
        share_BSH = inputs.slots.every(shared.share_BXH, 1)
        if not self.geometry.rules.hides_first:
            return share_BSH
        # The norm of zero is zero, and so is its share.
        return share_BSH * (inputs.angles_A[inputs.turn_BS] > 0)[..., None]

    def _shared(self, inputs: UnrollInputs, embedding_VH: Tensor, device: Device) -> Shared:
        dtype = self.input_proj.weight.dtype
        embedded_BXH = F.embedding(inputs.tokens_BX, embedding_VH).to(dtype)
        (share_BXH,) = self.token_norm.then(embedded_BXH, (self.token_columns,), device.ops)
        return Shared(
            inputs=inputs,
            device=device,
            form=attention_form(device.attention, inputs.layout, inputs.sequence),
            share_BXH=share_BXH,
            tables_AD=self.rotary.tables(inputs.angles_A, dtype),
        )
