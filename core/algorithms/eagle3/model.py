"""The EAGLE-3 draft (2503.01840), with EAGLE-3.1's norms (2605.09992) or without, and its training-time unroll.
Parameter names are the published checkpoint's.

The forward pass of a micro-batch runs all K steps and hands their outputs to an objective *inside* the call, so that
whoever shards the parameters sees their every use within one `forward`.

What the steps share is computed once: fc over the taps, the rotary tables, and the embeddings' share of q, k and v,
which is one product over T + K tokens instead of K products over T: step k reads it k rows further on.

Step 0's keys and values are the only ones that other slots, and with sequence parallelism other ranks, look at: they
are made first and `spread` once, all the rest is local.

Shape letters: B rows, S slots of this rank, X tokens that they read, Q running slots, K steps, F = taps x target hidden
size, H draft hidden size, Z width of q, k or v (or of what each is made of), Hq / Hk query / key-value heads, D head
size, A angles of the tables, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchspec.core.algorithms.eagle3.batch import UnrollInputs
from torchspec.core.algorithms.eagle3.geometry import Geometry
from torchspec.core.algorithms.vocabulary import VocabularyModule
from torchspec.core.attention.forms import AttentionForm, attention_form
from torchspec.core.attention.ttt import ttt_attention
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models import fused
from torchspec.core.models.layers import GatedMLP, LinearMap, RMSNorm
from torchspec.core.objectives.distillation import Head

Outcome = TypeVar("Outcome")
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every step of a micro-batch reads.

    form          how this rank's queries meet all keys
    shares_BXZ    the embeddings' share of q, k and v (or of the latents they are made of) at every token
    maps_ZH       the maps of the same that read the feature
    tables_AD     cos and sin of every angle
    """

    inputs: UnrollInputs
    device: Device
    form: AttentionForm
    shares_BXZ: QKV
    maps_ZH: QKV
    tables_AD: tuple[Tensor, Tensor]


class DraftLayer(nn.Module):
    """One decoder layer whose attention, of either kind, reads [norm(embedding) ; norm(feature)], twice the hidden
    width; else a Llama's."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        size, eps = geometry.hidden_size, geometry.rms_norm_eps
        self.norm_before_residual = geometry.norm_before_residual
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = geometry.projections()
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, geometry.intermediate_size)

    def first_keys(self, feature_BSH: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Step 0's keys and values of every slot, as `shared.form.attention` reads them."""
        inputs, ops = shared.inputs, shared.device.ops
        after = tuple(inputs.slots.every(share_BXZ, 1) for share_BXZ in shared.shares_BXZ[1:])
        key, value = self.hidden_norm.then(feature_BSH, shared.maps_ZH[1:], ops, after)
        return shared.form.spread(*self.self_attn.keys_values(key, value, inputs.turn_BS, shared.tables_AD, ops))

    def forward(self, step: int, shared: Shared, feature_BQH: Tensor, *keys_values: Tensor) -> tuple[Tensor, ...]:
        """(output [B, Q, H] before the final norm, and after step 0 this step's key and value).

        `keys_values` are the keys, then the values, of the steps before, step 0's as `first_keys` left them.
        """
        inputs, ops = shared.inputs, shared.device.ops
        before = len(keys_values) // 2
        keys, values = keys_values[:before], keys_values[before:]
        wanted = 3 if step else 1
        own = tuple(inputs.slots.take(share_BXZ, 1 + step) for share_BXZ in shared.shares_BXZ[:wanted])
        first, *rest = self.hidden_norm.then(feature_BQH, shared.maps_ZH[:wanted], ops, own)
        turns = (inputs.own_BQ + step, shared.tables_AD, ops)
        query = self.self_attn.query(first, *turns)
        written: tuple[Tensor, ...] = ()
        if rest:
            written = self.self_attn.keys_values(rest[0], rest[1], *turns)
            keys, values = (*keys, written[0]), (*values, written[1])
        mixed = ttt_attention(shared.form.attention, query, keys, values, inputs.mask, self.self_attn.scale)
        residual = self.hidden_norm(feature_BQH, ops) if self.norm_before_residual else feature_BQH
        residual = self.self_attn.add_output(residual, mixed, ops)
        return self.mlp(residual, self.post_attention_layernorm, ops), *written


class Eagle3Draft(VocabularyModule):
    """fc over the taps, one decoder layer, final norm, and a head over the draft vocabulary.

    With `geometry.fc_norm` fc reads [fc_norm[0](tap 0) ; fc_norm[1](tap 1) ; ...], with `geometry.norm_before_fc`
    input_norm([tap 0 ; tap 1 ; ...]).
    """

    def __init__(self, geometry: Geometry, vocabulary: VocabularyMap) -> None:
        super().__init__(vocabulary)
        size = geometry.hidden_size
        self.geometry = geometry
        self.fc = LinearMap(geometry.num_taps * geometry.target_hidden_size, size)
        if geometry.fc_norm:
            norms = (RMSNorm(geometry.target_hidden_size, geometry.rms_norm_eps) for _ in range(geometry.num_taps))
            self.fc_norm = nn.ModuleList(norms)
        if geometry.norm_before_fc:
            self.input_norm = RMSNorm(geometry.num_taps * geometry.target_hidden_size, geometry.rms_norm_eps)
        self.midlayer = DraftLayer(geometry)
        self.norm = RMSNorm(size, geometry.rms_norm_eps)
        self.lm_head = LinearMap(size, vocabulary.size)
        if geometry.owns_embedding:
            self.embed_tokens = nn.Embedding(geometry.vocab_size, size)
        self.rotary = geometry.rotary()

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
        feature_BSH = self.features(inputs.taps_BSF, device)
        # Made and exchanged outside what is run again: they are kept in any case.
        key, value = self.midlayer.first_keys(feature_BSH, shared)
        feature = inputs.slots.take(feature_BSH)
        outputs: list[Tensor] = []
        keys, values = [key], [value]
        for step in range(steps):
            if step and self.geometry.norm_output:
                feature = self.norm(feature, device.ops)
            given = (step, shared, feature, *keys, *values)
            if recompute and torch.is_grad_enabled():
                # Nothing here draws random numbers. Tensors are arguments of their own, so that hooks on what is kept
                # for the backward pass see them.
                feature, *own = checkpoint(self.midlayer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                feature, *own = self.midlayer(*given)
            outputs.append(feature)
            if own:
                keys.append(own[0])
                values.append(own[1])
        return outputs

    def features(self, taps_BSF: Tensor, device: Device) -> Tensor:
        """The first step's feature of every slot, [B, S, H]."""
        weight_HF = self.fc.weight
        taps_BSF = taps_BSF.to(device=weight_HF.device, dtype=weight_HF.dtype)
        if self.geometry.norm_before_fc:
            return self.input_norm.then(taps_BSF, (weight_HF,), device.ops)[0]
        if not self.geometry.fc_norm:
            return fused.linear(taps_BSF, weight_HF, device.ops)
        # Tap by tap, since a norm that is followed by a map keeps its input alone.
        added: Tensor | None = None
        taps = torch.split(taps_BSF, self.geometry.target_hidden_size, -1)
        for tap, (norm, part) in zip(taps, self.tap_maps, strict=True):
            (added,) = norm.then(tap, (part,), device.ops, (added,))
        assert added is not None
        return added

    @property
    def tap_maps(self) -> list[tuple[RMSNorm, Tensor]]:
        """Where taps are normed: of each its norm, and the columns of fc that read it, [H, target hidden size]."""
        parts = torch.split(self.fc.weight, self.geometry.target_hidden_size, -1)
        return [(cast(RMSNorm, norm), part) for norm, part in zip(self.fc_norm, parts, strict=True)]

    def _shared(self, inputs: UnrollInputs, embedding_VH: Tensor, device: Device) -> Shared:
        layer, dtype, size = self.midlayer, self.fc.weight.dtype, self.geometry.hidden_size
        # Cut once per micro-batch: the steps' gradients meet in the cut before they are widened again.
        embedding_maps = layer.self_attn.input_columns(0, size)
        embedded_BXH = F.embedding(inputs.tokens_BX, embedding_VH).to(dtype)
        shares = layer.input_layernorm.then(embedded_BXH, embedding_maps, device.ops)
        return Shared(
            inputs=inputs,
            device=device,
            form=attention_form(device.attention, inputs.layout, inputs.sequence),
            shares_BXZ=shares,  # type: ignore[arg-type]
            maps_ZH=layer.self_attn.input_columns(size, 2 * size),
            tables_AD=self.rotary.tables(inputs.angles_A, dtype),
        )
