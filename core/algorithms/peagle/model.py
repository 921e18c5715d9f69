"""The P-EAGLE draft (2602.01469) and its training forward. Parameter names are the published checkpoint's.

Every depth runs at once: an element (a, j) of depth j >= 1 reads the mask token's embedding and a learned feature in
place of what is not known yet, and sees the depth-0 keys of anchors up to a and the keys that its own anchor wrote at
depths 1..j. So each depth is attention as in the training-time test (`core.attention.ttt`), with nothing fed back from
depth to depth: in every layer, depth-0 keys are made first and `spread` once; all the rest is local.

The layers behind the first are plain Llama layers. In the first one all elements of depths >= 1 are alike until they
are rotated, so q, k and v are worked out once for all of them.

Shape letters: B rows, S slots of this rank, Q elements of a depth (S of depth 0; the others lead with those that go
deepest, so that what depth j's elements wrote at depth i < j are the first Q_j rows of it), K depths, F = taps x target
hidden size, H draft hidden size, D head size, A angles of the tables, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchspec.core.algorithms.peagle.batch import DepthInputs
from torchspec.core.algorithms.peagle.geometry import PEagleGeometry
from torchspec.core.algorithms.vocabulary import VocabularyModule
from torchspec.core.attention.forms import AttentionForm, attention_form
from torchspec.core.attention.ttt import ttt_attention
from torchspec.core.interfaces.device import Device, FusedOps
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models import fused
from torchspec.core.models.layers import AttentionProjections, GatedMLP, LinearMap, RMSNorm
from torchspec.core.objectives.distillation import Head

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, kw_only=True)
class Maps:
    """q, k and v of a layer: what reads its input, and in the first layer what reads the embedding."""

    hidden: tuple[Tensor, ...]
    embedding: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every layer of a micro-batch reads: inputs, how queries meet all keys, cos and sin of every angle."""

    inputs: DepthInputs
    device: Device
    form: AttentionForm
    tables_AD: tuple[Tensor, Tensor]


class DraftLayer(nn.Module):
    """A Llama decoder layer; the first one's attention reads [norm(embedding) ; norm(feature)]."""

    def __init__(self, geometry: PEagleGeometry, *, first: bool) -> None:
        super().__init__()
        size, eps = geometry.hidden_size, geometry.rms_norm_eps
        self.first = first
        self.norm_before_residual = first and geometry.norm_before_residual
        self.input_layernorm = RMSNorm(size, eps)
        if first:
            self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = AttentionProjections(
            2 * size if first else size,
            size,
            geometry.num_attention_heads,
            geometry.num_key_value_heads,
            geometry.head_dim,
        )
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, geometry.intermediate_size)

    def maps(self) -> Maps:
        """Cut once per micro-batch: the depths' gradients meet in the cut before they are widened again."""
        attention, size = self.self_attn, self.input_layernorm.weight.shape[0]
        if self.first:
            return Maps(hidden=attention.input_columns(size, 2 * size), embedding=attention.input_columns(0, size))
        return Maps(hidden=(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))

    def heads(
        self, x_BQH: Tensor, embedded_BQH: Tensor | None, maps: Maps, ops: FusedOps, chosen: slice = slice(None)
    ) -> list[Tensor]:
        """The `chosen` of q, k and v [B, Q, heads, D], before rotation; the first layer is given the embeddings."""
        norm, adds = self.input_layernorm, None
        if embedded_BQH is not None:
            assert maps.embedding is not None
            norm = self.hidden_norm
            adds = self.input_layernorm.then(embedded_BQH, maps.embedding[chosen], ops)
        return [self.self_attn.heads(part) for part in norm.then(x_BQH, maps.hidden[chosen], ops, adds)]

    def finish(self, x_BQH: Tensor, mixed_BQHD: Tensor, ops: FusedOps) -> Tensor:
        """The residual stream after the layer, of its input and the attention's output."""
        residual = self.hidden_norm(x_BQH, ops) if self.norm_before_residual else x_BQH
        residual = self.self_attn.add_output(residual.expand(*mixed_BQHD.shape[:2], -1), mixed_BQHD, ops)
        out: Tensor = self.mlp(residual, self.post_attention_layernorm, ops)
        return out

    def first_keys(
        self, shared: Shared, maps: Maps, x_BSH: Tensor, embedded_BSH: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Depth 0's keys and values of every slot, as `shared.form.attention` reads them; a collective."""
        ops = shared.device.ops
        key, value = self.heads(x_BSH, embedded_BSH, maps, ops, slice(1, None))
        return shared.form.spread(fused.rotate(key, shared.inputs.turns[0], shared.tables_AD, ops), value)

    def forward(
        self,
        depth: int,
        shared: Shared,
        maps: Maps,
        x_BQH: Tensor,
        embedded_BQH: Tensor | None,
        *keys_values: Tensor,
    ) -> tuple[Tensor, ...]:
        """(output [B, Q, H] of a depth's elements, and behind depth 0 their keys and values).

        `keys_values` are the keys, then the values, of the depths before, depth 0's as `first_keys` left them.
        Embedding and feature may be those of one element, [1, 1, H], if all are alike.
        """
        inputs, ops = shared.inputs, shared.device.ops
        turn_BQ, count = inputs.turns[depth], len(keys_values) // 2
        every = (*turn_BQ.shape, -1, -1)
        query, *own = (
            part.expand(every) for part in self.heads(x_BQH, embedded_BQH, maps, ops, slice(3 if depth else 1))
        )
        query = fused.rotate(query, turn_BQ, shared.tables_AD, ops)
        written: tuple[Tensor, ...] = ()
        if own:
            written = (fused.rotate(own[0], turn_BQ, shared.tables_AD, ops), own[1])
        keys, values = (
            [first, *(one[:, : turn_BQ.shape[1]] for one in others)]
            for first, *others in (keys_values[:count], keys_values[count:])
        )
        mixed = ttt_attention(
            shared.form.attention,
            query,
            [*keys, *written[:1]],
            [*values, *written[1:]],
            inputs.masks[depth],
            self.self_attn.head_dim**-0.5,
        )
        return self.finish(x_BQH, mixed, ops), *written


class PEagleDraft(VocabularyModule):
    """fc over the taps or over `mask_hidden`, decoder layers, final norm, and a head over the draft vocabulary."""

    def __init__(self, geometry: PEagleGeometry, vocabulary: VocabularyMap) -> None:
        super().__init__(vocabulary)
        size = geometry.hidden_size
        self.geometry = geometry
        self.fc = LinearMap(geometry.tapped_size, size, called=True)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, geometry.tapped_size))
        self.layers = nn.ModuleList(DraftLayer(geometry, first=number == 0) for number in range(geometry.num_layers))
        self.norm = RMSNorm(size, geometry.rms_norm_eps)
        self.lm_head = LinearMap(size, vocabulary.size)
        if geometry.owns_embedding:
            self.embed_tokens = nn.Embedding(geometry.vocab_size, size)
        self.rotary = geometry.rotary()

    @property
    def midlayer(self) -> DraftLayer:
        """The layer that is EAGLE-3's only one."""
        return next(self.every_layer())

    def every_layer(self) -> Iterator[DraftLayer]:
        """The layers, first to last."""
        for layer in self.layers:
            assert isinstance(layer, DraftLayer)
            yield layer

    def embedded(self, tokens: Tensor, target_VH: Tensor) -> Tensor:
        """Embeddings of tokens from the draft's own table, or the target's [V, H]."""
        table_VH = self.embed_tokens.weight if self.geometry.owns_embedding else target_VH
        return F.embedding(tokens, table_VH).to(self.fc.weight.dtype)

    def masks(self, target_VH: Tensor) -> tuple[Tensor, Tensor]:
        """(feature, embedding) of every element beyond depth 0, [1, 1, H]."""
        mask = torch.full((1, 1), self.geometry.mask_token, device=target_VH.device)
        return self.fc(self.mask_hidden), self.embedded(mask, target_VH)

    def forward(
        self,
        inputs: DepthInputs,
        embedding_VH: Tensor,
        device: Device,
        objective: Callable[[list[Tensor], Head], Outcome],
        *,
        recompute: bool = False,
    ) -> Outcome:
        """Run every depth, then `objective(outputs, head)`; `outputs[j]` [B * Q_j, H] are before the norm.

        `embedding_VH` is the target's. With `recompute` the layers' activations are made again in the backward pass.
        The outcome should be a tuple or dict of tensors: sharding attaches its hooks to those.
        """
        outputs = self.states(inputs, embedding_VH, device, recompute=recompute)
        head = Head(norm_H=self.norm.weight, head_NH=self.lm_head.weight, eps=self.norm.eps)
        return objective([output.flatten(0, 1) for output in outputs], head)

    def states(
        self, inputs: DepthInputs, embedding_VH: Tensor, device: Device, *, recompute: bool = False
    ) -> list[Tensor]:
        """The last layer's outputs [B, Q_j, H] of every depth, before the final norm."""
        dtype = self.fc.weight.dtype
        shared = Shared(
            inputs=inputs,
            device=device,
            form=attention_form(device.attention, inputs.layout, inputs.sequence),
            tables_AD=self.rotary.tables(inputs.angles_A, dtype),
        )
        depths = len(inputs.turns)
        mask_feature, mask_embedded = self.masks(embedding_VH)
        taps_BSF = inputs.taps_BSF.to(device=self.fc.weight.device, dtype=dtype)
        states = [fused.linear(taps_BSF, self.fc.weight, device.ops)]
        states += [mask_feature] * (depths - 1)
        embedded: list[Tensor | None] = [self.embedded(inputs.tokens_BS, embedding_VH)]
        embedded += [mask_embedded] * (depths - 1)
        for layer in self.every_layer():
            states = _run(layer, shared, states, embedded, recompute=recompute)
            embedded = [None] * depths
        return states


def _run(
    layer: DraftLayer, shared: Shared, states: list[Tensor], embedded: list[Tensor | None], *, recompute: bool
) -> list[Tensor]:
    """A layer's outputs at every depth."""
    maps = layer.maps()
    # Made and exchanged outside what is run again: they are kept in any case.
    key, value = layer.first_keys(shared, maps, states[0], embedded[0])
    keys, values, outputs = [key], [value], []
    for depth, (state, embedding) in enumerate(zip(states, embedded, strict=True)):
        given = (depth, shared, maps, state, embedding, *keys, *values)
        if recompute and torch.is_grad_enabled():
            # Nothing here draws random numbers. Tensors are arguments of their own, so that hooks on what is kept for
            # the backward pass see them.
            output, *own = checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            output, *own = layer(*given)
        outputs.append(output)
        if own:
            keys.append(own[0])
            values.append(own[1])
    return outputs
