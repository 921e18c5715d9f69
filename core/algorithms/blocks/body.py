"""The draft of a block: decoder layers whose slots look at the target's features and at each other (2602.06036).

Context features c = norm(fc(taps)). Every layer takes keys and values of the context from c, through the same maps as
those of the block's own slots; queries come from the slots alone. Queries and keys are normed head by head, as in
Qwen3. Embedding and output head are the target's, frozen. Parameter names are the published checkpoint's.

Keys and values of the context depend on no layer's output: they are made first and `spread` once, all the rest is
local.

Shape letters: B rows, S positions of this rank, A blocks of a row, Z slots of a block, Q = A Z, K steps of a block,
F = taps x target hidden size, H hidden size, D head size, P angles of the tables, N draft vocabulary, X width of what a
correction adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchspec.core.algorithms.blocks.batch import BlockInputs
from torchspec.core.algorithms.blocks.geometry import BlockGeometry
from torchspec.core.algorithms.vocabulary import VocabularyModule
from torchspec.core.attention.block import BlockForm, block_attention
from torchspec.core.attention.forms import AttentionForm, attention_form
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models import fused
from torchspec.core.models.layers import AttentionProjections, GatedMLP, LinearMap, RMSNorm
from torchspec.core.objectives.chunks import ShardLogits
from torchspec.core.objectives.distillation import Head
from torchspec.core.objectives.frozen import FrozenHead

Outcome = TypeVar("Outcome")
KeysValues = tuple[Tensor, Tensor]


class Correction(Protocol):
    """What a draft adds to the logits of its steps, given the tokens before: f E^T, and E of the draft vocabulary."""

    @property
    def map_NX(self) -> Tensor: ...

    def features(self, normed_BAKH: Tensor, before_BAK: Tensor, embedding_VH: Tensor) -> Tensor:
        """f [B, A, K, X] of every step at once: `normed_BAKH` are the steps' outputs after the final norm, `before_BAK`
        the tokens before those that they predict, of the text; differentiable."""
        ...

    def follow(
        self, state: Tensor | None, normed_BH: Tensor, token_B: Tensor, embedding_VH: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(f [B, X] of one step, the state for the next), from the state of the step before (None at the first), the
        step's output after the final norm and the token before the one that it drafts; for decoding."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every layer of a micro-batch reads. `tables_PD` are cos and sin of every angle."""

    inputs: BlockInputs
    device: Device
    form: AttentionForm
    tables_PD: tuple[Tensor, Tensor]


class NormedAttention(AttentionProjections):
    """Projections with a norm over every head of queries and keys, as Qwen3 has it."""

    def __init__(self, geometry: BlockGeometry) -> None:
        size, width = geometry.hidden_size, geometry.head_dim
        super().__init__(size, size, geometry.num_attention_heads, geometry.num_key_value_heads, width)
        self.q_norm = RMSNorm(width, geometry.rms_norm_eps)
        self.k_norm = RMSNorm(width, geometry.rms_norm_eps)


class BlockLayer(nn.Module):
    """One decoder layer; of kind "full" or "sliding"."""

    def __init__(self, geometry: BlockGeometry, kind: str) -> None:
        super().__init__()
        size, eps = geometry.hidden_size, geometry.rms_norm_eps
        self.kind, self.mask = kind, geometry.mask_of(kind)
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = NormedAttention(geometry)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, geometry.intermediate_size)

    def context(self, features_BSH: Tensor, shared: Shared) -> KeysValues:
        """Keys and values of the context, as `shared.form.attention` reads them; a collective."""
        attention, ops = self.self_attn, shared.device.ops
        key = attention.heads(fused.linear(features_BSH, attention.k_proj.weight, ops))
        value = attention.heads(fused.linear(features_BSH, attention.v_proj.weight, ops))
        key = fused.rotate(attention.k_norm(key, ops), shared.inputs.turn_BS, shared.tables_PD, ops)
        return shared.form.spread(key, value)

    def forward(self, shared: Shared, x_BQH: Tensor, context_key: Tensor, context_value: Tensor) -> Tensor:
        """The residual stream of the slots after the layer."""
        inputs, ops, attention = shared.inputs, shared.device.ops, self.self_attn
        maps = tuple(proj.weight for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        query, key, value = (attention.heads(part) for part in self.input_layernorm.then(x_BQH, maps, ops))
        query, key = (
            fused.rotate(norm(part, ops), inputs.own_BQ, shared.tables_PD, ops)
            for norm, part in ((attention.q_norm, query), (attention.k_norm, key))
        )
        form = BlockForm(
            context=shared.form.attention,
            own=shared.device.attention,
            mask=inputs.masks[self.kind],
            block=self.mask,
            scale=attention.head_dim**-0.5,
        )
        mixed = block_attention(form, query, (context_key, context_value), (key, value))
        out_BQH: Tensor = self.mlp(attention.add_output(x_BQH, mixed, ops), self.post_attention_layernorm, ops)
        return out_BQH


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """What a pass over blocks leaves for the objective.

    outputs   [K] of [B A, H]: each step's, before the final norm
    head      final norm, the target's rows of the draft vocabulary, frozen, and the correction's map
    extras    [K] of [B A, X]: what the correction adds, as `distil` takes it; None without
    normed    [B A, K, H]: outputs after the final norm, where there is a correction
    """

    outputs: list[Tensor]
    head: Head
    extras: list[Tensor] | None = None
    normed: Tensor | None = None


class BlockDraft(VocabularyModule):
    """fc over the taps and its norm, decoder layers, final norm."""

    def __init__(self, geometry: BlockGeometry, vocabulary: VocabularyMap) -> None:
        super().__init__(vocabulary)
        size, eps = geometry.hidden_size, geometry.rms_norm_eps
        self.geometry = geometry
        self.fc = LinearMap(geometry.num_taps * geometry.target_hidden_size, size)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(BlockLayer(geometry, kind) for kind in geometry.layer_types)
        self.norm = RMSNorm(size, eps)
        self.rotary = geometry.rotary()
        self.target_rows = FrozenHead()

    @property
    def correction(self) -> Correction | None:
        """What an algorithm adds to the logits; nothing here."""
        return None

    def forward(
        self,
        inputs: BlockInputs,
        target: TargetHead,
        device: Device,
        objective: Callable[[Drafted], Outcome],
        *,
        shard_logits: ShardLogits = "tokens",
        recompute: bool = False,
    ) -> Outcome:
        """Run the blocks, then `objective`.

        The outcome should be a tuple or dict of tensors: sharding attaches its hooks to those.
        """
        states_BAKH = self.states(inputs, target.embedding_VH, device, recompute=recompute)
        rows_NH, is_part = self.target_rows.rows(target, self.vocabulary, self.norm.weight.dtype, shard_logits)
        drafted = Drafted(
            outputs=[part.flatten(0, 1) for part in states_BAKH.unbind(2)],
            head=Head(norm_H=self.norm.weight, head_NH=rows_NH, eps=self.norm.eps, is_part=is_part),
        )
        return objective(self._corrected(drafted, states_BAKH, inputs, target.embedding_VH, device))

    def states(self, inputs: BlockInputs, embedding_VH: Tensor, device: Device, *, recompute: bool = False) -> Tensor:
        """[B, A, K, H] of the slots that predict, before the final norm."""
        dtype = self.fc.weight.dtype
        shared = Shared(
            inputs=inputs,
            device=device,
            form=attention_form(device.attention, inputs.layout, inputs.sequence),
            tables_PD=self.rotary.tables(inputs.angles_P, dtype),
        )
        taps_BSF = inputs.taps_BSF.to(device=self.fc.weight.device, dtype=dtype)
        context_BSH = self.hidden_norm(fused.linear(taps_BSF, self.fc.weight, device.ops), device.ops)
        # Made and exchanged outside what is run again: they are kept in any case.
        contexts = [layer.context(context_BSH, shared) for layer in self._layers()]
        x_BQH = F.embedding(inputs.tokens_BQ, embedding_VH).to(dtype)
        for layer, context in zip(self._layers(), contexts, strict=True):
            if recompute and torch.is_grad_enabled():
                # Nothing here draws random numbers. Tensors are arguments of their own, so that hooks on what is kept
                # for the backward pass see them.
                x_BQH = checkpoint(layer, shared, x_BQH, *context, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BQH = layer(shared, x_BQH, *context)
        shape = self.geometry.block
        return x_BQH.view(len(x_BQH), -1, shape.size, x_BQH.shape[-1])[:, :, shape.first_slot :]

    def _corrected(
        self, drafted: Drafted, states_BAKH: Tensor, inputs: BlockInputs, embedding_VH: Tensor, device: Device
    ) -> Drafted:
        correction = self.correction
        if correction is None:
            return drafted
        normed_BAKH = self.norm(states_BAKH, device.ops)
        extra_BAKX = correction.features(normed_BAKH, inputs.before_BAK, embedding_VH)
        return replace(
            drafted,
            head=replace(drafted.head, extra_NX=correction.map_NX),
            extras=[part.flatten(0, 1) for part in extra_BAKX.unbind(2)],
            normed=normed_BAKH.flatten(0, 1),
        )

    def _layers(self) -> list[BlockLayer]:
        return list(self.layers)  # type: ignore[arg-type]
