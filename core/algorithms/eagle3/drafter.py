"""Chains of drafted tokens with a key/value cache: the training unroll, one slot at a time, in as few operations as
possible. A draft step is a handful of small matrix products, so on a CPU the number of calls decides its speed.

What is prepared once: q, k, v (or the latents that they are made of, `heads`) as one matrix, gate and up as one; every
norm's weight folded into the matrix that follows it (EAGLE-3.1's norms of the taps into fc); and, while it is small,
for each token the draft can say the embedding's whole share of q, k, v.

Shape letters: B sequences, M newly confirmed positions, L drafted tokens, S cached positions, H draft hidden size,
Z width of q, k and v (or of what they are made of) together, D head size, N draft vocabulary, V target vocabulary,
P taps, T target hidden size, F = P T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from torchspec.core.algorithms.eagle3.geometry import Geometry
from torchspec.core.algorithms.eagle3.heads import Heads, RotaryRows, UnitNorm, folded, heads_of, weight_after_unit
from torchspec.core.algorithms.eagle3.model import Eagle3Draft
from torchspec.core.interfaces.algorithm import Proposal
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.interfaces.target import TargetHead

SHARES_BYTES = 64 << 20
"""Most memory for `DraftWeights.embedded_NZ`. A draft of an 8B target with 32,000 tokens (Z = 6,144) would need 6 times
that in bf16 and 12 times in fp32, and there the product that the table saves is no matter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftWeights:
    """A draft's matrices, laid out for products from the left: [in, out], contiguous.

    embedded_NZ      each draft token's share of q, k, v; None where it would be too large
    unit_tap         of a tap; None where taps are not normed one by one
    unit_taps        of all taps side by side; None where they are not normed together
    hidden_scale_H   what turns a unit-normed feature into hidden_norm's output
    output_scale_H   what turns a unit-normed output into the next feature; None where that is the output as it is
    ids_N            target ids of the draft vocabulary
    """

    geometry: Geometry
    heads: Heads
    unit: UnitNorm
    unit_tap: UnitNorm | None
    unit_taps: UnitNorm | None
    embedding_VH: Tensor
    fc_FH: Tensor
    embed_HZ: Tensor
    feature_HZ: Tensor
    embedded_NZ: Tensor | None
    hidden_scale_H: Tensor
    output_scale_H: Tensor | None
    gate_up_HX: Tensor
    down_XH: Tensor
    head_HN: Tensor
    ids_N: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, draft: Eagle3Draft, head: TargetHead) -> DraftWeights:
        layer, geometry, size = draft.midlayer, draft.geometry, draft.geometry.hidden_size
        mlp, dtype = layer.mlp, draft.fc.weight.dtype
        heads = heads_of(layer.self_attn, geometry.rms_norm_eps)
        embed_HZ = folded(heads.input_ZX[:, :size], layer.input_layernorm.weight)
        unit = UnitNorm(size, geometry.rms_norm_eps, draft.fc.weight)
        unit_tap, unit_taps, fc_FH = None, None, draft.fc.weight.T.contiguous()
        if geometry.fc_norm:
            unit_tap = UnitNorm(geometry.target_hidden_size, geometry.rms_norm_eps, draft.fc.weight)
            fc_FH = torch.cat([folded(part, norm.weight) for norm, part in draft.tap_maps])
        if geometry.norm_before_fc:
            unit_taps = UnitNorm(draft.fc.weight.shape[1], geometry.rms_norm_eps, draft.fc.weight)
            fc_FH = folded(draft.fc.weight, draft.input_norm.weight)
        embedding_VH = draft.embedding(head.embedding_VH)
        ids_N = draft.vocabulary.ids_N
        fits = ids_N.numel() * embed_HZ.shape[1] * dtype.itemsize <= SHARES_BYTES
        return cls(
            geometry=geometry,
            heads=heads,
            unit=unit,
            unit_tap=unit_tap,
            unit_taps=unit_taps,
            embedding_VH=embedding_VH,
            fc_FH=fc_FH,
            embed_HZ=embed_HZ,
            feature_HZ=folded(heads.input_ZX[:, size:], layer.hidden_norm.weight),
            embedded_NZ=unit(embedding_VH[ids_N].to(dtype)) @ embed_HZ if fits else None,
            hidden_scale_H=weight_after_unit(layer.hidden_norm.weight).to(dtype),
            output_scale_H=weight_after_unit(draft.norm.weight).to(dtype) if geometry.norm_output else None,
            gate_up_HX=folded(
                torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), layer.post_attention_layernorm.weight
            ),
            down_XH=mlp.down_proj.weight.T.contiguous(),
            head_HN=folded(draft.lm_head.weight, draft.norm.weight),
            ids_N=ids_N,
        )

    def share_of(self, chosen_B: Tensor) -> Tensor:
        """[B, Z]: what the embeddings of these draft tokens add to q, k, v."""
        if self.embedded_NZ is not None:
            return self.embedded_NZ.index_select(0, chosen_B)
        embedded_BH = F.embedding(self.ids_N[chosen_B], self.embedding_VH).to(self.embed_HZ.dtype)
        share_BZ: Tensor = self.unit(embedded_BH) @ self.embed_HZ
        return share_BZ


class Eagle3Drafter:
    """Implements `Drafter` with the parameters that the draft holds when this is made."""

    def __init__(self, draft: Eagle3Draft, head: TargetHead, device: Device, taps: tuple[int, ...]) -> None:
        self.taps = taps
        self._weights = DraftWeights.of(draft, head)
        self._rotary = RotaryRows(draft.rotary, draft.fc.weight)
        self._device = device

    def open(self, batch_size: int) -> Eagle3Session:
        return Eagle3Session(self._weights, self._rotary, self._device, batch_size)


class Eagle3Session:
    """Implements `DraftSession`. The cache holds the step-0 keys of every confirmed position; the keys of a round's
    later steps are written behind them and overwritten by the next round.
    """

    def __init__(self, weights: DraftWeights, rotary: RotaryRows, device: Device, batch_size: int) -> None:
        self._weights, self._rotary, self._device = weights, rotary, device
        geometry = weights.geometry
        self._lengths = [0] * batch_size
        self._keys = weights.fc_FH.new_empty(batch_size, 0, geometry.num_key_value_heads, geometry.head_dim)
        self._values = torch.empty_like(self._keys)

    @torch.inference_mode()
    def propose(
        self,
        taps: Sequence[Tensor],
        next_tokens: Sequence[Tensor],
        length: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Proposal:
        """See `DraftSession.propose`."""
        weights = self._weights
        counts = [tokens.numel() for tokens in next_tokens]
        confirmed = max(kept + count for kept, count in zip(self._lengths, counts, strict=True))
        # Step 0 writes as many columns in every row as the row with most news has, the fullest row included.
        self._reserve(max(confirmed + length, max(self._lengths) + max(counts)))
        feature_BH = out_BH = self._confirm(taps, next_tokens, counts)
        chosen: list[Tensor] = []
        probs: list[Tensor] = []
        for step in range(length):
            if step:
                out_BH = self._follow(feature_BH, chosen[-1], step)
            unit_BH = weights.unit(out_BH)
            feature_BH = out_BH if weights.output_scale_H is None else unit_BH * weights.output_scale_H
            logits_BN = unit_BH @ weights.head_HN
            if temperature == 0.0:
                chosen.append(logits_BN.max(-1).indices)
                continue
            wide = torch.promote_types(logits_BN.dtype, torch.float32)
            probs.append(torch.softmax(logits_BN.to(wide) / temperature, -1))
            chosen.append(torch.multinomial(probs[-1], 1, generator=generator)[:, 0])
        if not chosen:
            return Proposal(tokens_BL=next_tokens[0].new_empty(len(counts), 0))
        tokens_BL = weights.ids_N[torch.stack(chosen, 1)]
        return Proposal(tokens_BL=tokens_BL, probs_BLV=self._whole(probs) if probs else None)

    def keep(self, rows: Sequence[int]) -> None:
        """See `DraftSession.keep`."""
        self._lengths = [self._lengths[row] for row in rows]
        with torch.inference_mode():
            self._keys, self._values = self._keys[list(rows)], self._values[list(rows)]

    def _confirm(self, taps: Sequence[Tensor], next_tokens: Sequence[Tensor], counts: list[int]) -> Tensor:
        """Step 0: cache every new position's key, run the layer at each row's last; -> its output [B, H]."""
        weights = self._weights
        dtype = weights.fc_FH.dtype
        if len(counts) == 1:
            taps_BMPT, tokens_BM = taps[0][None].to(dtype), next_tokens[0][None]
        else:
            taps_BMPT = pad_sequence(list(taps), batch_first=True).to(dtype)
            tokens_BM = pad_sequence(list(next_tokens), batch_first=True)
        if weights.unit_tap is not None:
            taps_BMPT = weights.unit_tap(taps_BMPT)
        taps_BMF = taps_BMPT.flatten(2)
        if weights.unit_taps is not None:
            taps_BMF = weights.unit_taps(taps_BMF)
        feature_BMH = taps_BMF @ weights.fc_FH
        embedded_BMH = weights.unit(F.embedding(tokens_BM, weights.embedding_VH).to(dtype))
        share_BMZ = embedded_BMH @ weights.embed_HZ
        starts = self._lengths
        self._lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        unit_BMH = weights.unit(feature_BMH)
        qkv_BMZ = share_BMZ + unit_BMH @ weights.feature_HZ
        query_BMHD = self._cached(qkv_BMZ, starts)
        if min(counts) == max(counts):
            last: tuple[slice | Tensor, int | Tensor] = (slice(None), -1)
        else:
            counted = torch.tensor(counts, device=tokens_BM.device)
            last = (torch.arange(len(counts), device=tokens_BM.device), counted - 1)
        return self._layer(feature_BMH[last], unit_BMH[last], query_BMHD[last], 0)

    def _follow(self, feature_BH: Tensor, chosen_B: Tensor, step: int) -> Tensor:
        """A later step: the layer reads what the step before left, and the token it chose; -> its output [B, H]."""
        weights = self._weights
        unit_BH = weights.unit(feature_BH)
        qkv_BZ = torch.addmm(weights.share_of(chosen_B), unit_BH, weights.feature_HZ)
        starts = self._lengths if step == 1 else [length + step - 1 for length in self._lengths]
        query_BMHD = self._cached(qkv_BZ[:, None], starts)
        return self._layer(feature_BH, unit_BH, query_BMHD[:, 0], step)

    def _cached(self, qkv_BMZ: Tensor, starts: list[int]) -> Tensor:
        """Rotate q and k, write k and v at positions starts[b]..; -> q [B, M, Hq, D].

        Rows with fewer new positions than M write rubbish behind their own, which no mask shows and later writes cover.
        """
        heads, count = self._weights.heads, qkv_BMZ.shape[1]
        if min(starts) == max(starts):
            at = slice(starts[0], starts[0] + count)
            query, self._keys[:, at], self._values[:, at] = heads(qkv_BMZ, self._rotary, at)
            return query
        place_BM = torch.tensor(starts, device=qkv_BMZ.device)[:, None] + torch.arange(count, device=qkv_BMZ.device)
        row_B1 = torch.arange(len(starts), device=qkv_BMZ.device)[:, None]
        query, self._keys[row_B1, place_BM], self._values[row_B1, place_BM] = heads(qkv_BMZ, self._rotary, place_BM)
        return query

    def _layer(self, feature_BH: Tensor, unit_BH: Tensor, query_BHD: Tensor, step: int) -> Tensor:
        """Attention over everything cached up to this step, then the MLP; -> the layer's output [B, H]."""
        weights = self._weights
        ends = [length + step for length in self._lengths] if step else self._lengths
        longest = max(ends)
        if min(ends) == longest:
            mask = MaskSpec.full()
        else:
            end_BQ = torch.tensor(ends)[:, None]
            mask = MaskSpec.limits(torch.zeros_like(end_BQ), end_BQ)
        keys, values = self._keys[:, :longest], self._values[:, :longest]
        mixed, _ = self._device.attention.forward(query_BHD[:, None], keys, values, mask, weights.heads.scale)
        residual_BH = unit_BH * weights.hidden_scale_H if weights.geometry.norm_before_residual else feature_BH
        residual_BH = torch.addmm(residual_BH, mixed.flatten(1), weights.heads.output_XH)
        gate, up = (weights.unit(residual_BH) @ weights.gate_up_HX).chunk(2, -1)
        return torch.addmm(residual_BH, self._device.ops.swiglu(gate, up), weights.down_XH)

    def _reserve(self, positions: int) -> None:
        """Room for so many positions in every row; doubles, so that a decoding copies each key a few times at most."""
        room = self._keys.shape[1]
        if positions > room:
            grown = max(positions, 2 * room, 256)
            self._keys, self._values = (_grown(cache, grown) for cache in (self._keys, self._values))
            if grown > self._rotary.cos_SHR.shape[0]:
                self._rotary.reserve(grown)

    def _whole(self, probs: list[Tensor]) -> Tensor:
        """Probabilities over the target vocabulary [B, L, V]; zero for tokens the draft cannot say."""
        probs_BLN = torch.stack(probs, 1)
        if probs_BLN.shape[-1] == self._weights.geometry.vocab_size:
            return probs_BLN
        whole_BLV = probs_BLN.new_zeros(*probs_BLN.shape[:2], self._weights.geometry.vocab_size)
        return whole_BLV.index_copy_(2, self._weights.ids_N, probs_BLN)


def _grown(cache_BSHD: Tensor, positions: int) -> Tensor:
    # Zeros: a kernel may multiply a masked value by its weight of 0, and what lay in memory may be no number.
    grown = cache_BSHD.new_zeros(cache_BSHD.shape[0], positions, *cache_BSHD.shape[2:])
    grown[:, : cache_BSHD.shape[1]] = cache_BSHD
    return grown
