"""Chains of tokens drafted by a multi-token-prediction head with a key/value cache: the training unroll, one slot at a
time.

Shape letters: B sequences, M newly confirmed positions, L drafted tokens, S cached positions, H hidden size, D head
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from torchspec.core.algorithms.mtp.model import MtpDraft
from torchspec.core.interfaces.algorithm import Proposal
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.models.layers import RMSNorm

RESERVED = 256
"""Fewest positions that a cache has room for."""


class MtpDrafter:
    """Implements `Drafter` with the parameters that the draft holds when this is made."""

    def __init__(self, draft: MtpDraft, head: TargetHead, device: Device, taps: tuple[int, ...]) -> None:
        self.taps = taps
        self._draft, self._head, self._device = draft, head, device

    def open(self, batch_size: int) -> MtpSession:
        return MtpSession(self._draft, self._head, self._device, batch_size)


class MtpSession:
    """Implements `DraftSession`. The cache holds the step-0 keys of every confirmed position; the keys of a round's
    later steps are written behind them and overwritten by the next round.
    """

    def __init__(self, draft: MtpDraft, head: TargetHead, device: Device, batch_size: int) -> None:
        self._draft, self._head, self._device = draft, head, device
        self._rules = draft.geometry.rules
        self._scale = draft.geometry.head_dim**-0.5
        self._lengths = [0] * batch_size
        self._weight = draft.input_proj.weight.detach()
        kv_heads, width = draft.geometry.num_key_value_heads, draft.geometry.head_dim
        self._keys = self._weight.new_empty(batch_size, 0, kv_heads, width)
        self._values = torch.empty_like(self._keys)
        self._rows_VH, _ = draft.target_rows.rows(head, draft.vocabulary, self._weight.dtype, "tokens")

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
        counts = [tokens.numel() for tokens in next_tokens]
        # Step 0 writes as many columns in every row as the row with most news has, the fullest row included.
        self._reserve(max(self._lengths) + max(counts) + length)
        out_BH = self._confirm(taps, next_tokens, counts)
        chosen: list[Tensor] = []
        probs: list[Tensor] = []
        for step in range(length):
            if step:
                out_BH = self._follow(out_BH, chosen[-1], step)
            logits_BV = F.linear(self._normed(out_BH, self._draft.norm), self._rows_VH)
            if temperature == 0.0:
                chosen.append(logits_BV.argmax(-1))
                continue
            wide = torch.promote_types(logits_BV.dtype, torch.float32)
            probs.append(torch.softmax(logits_BV.to(wide) / temperature, -1))
            chosen.append(torch.multinomial(probs[-1], 1, generator=generator)[:, 0])
        if not chosen:
            return Proposal(tokens_BL=next_tokens[0].new_empty(len(counts), 0))
        return Proposal(tokens_BL=torch.stack(chosen, 1), probs_BLV=torch.stack(probs, 1) if probs else None)

    def keep(self, rows: Sequence[int]) -> None:
        """See `DraftSession.keep`."""
        self._lengths = [self._lengths[row] for row in rows]
        with torch.inference_mode():
            self._keys, self._values = self._keys[list(rows)], self._values[list(rows)]

    def _confirm(self, taps: Sequence[Tensor], next_tokens: Sequence[Tensor], counts: list[int]) -> Tensor:
        """Step 0: cache every new position's key, run the layer at each row's last; -> its output [B, H]."""
        state_BMH = pad_sequence([tap[:, 0] for tap in taps], batch_first=True)
        if self._rules.state == "post_norm":
            state_BMH = self._head.normed(state_BMH, "pre_norm")
        tokens_BM = pad_sequence(list(next_tokens), batch_first=True)
        starts = torch.tensor(self._lengths, device=tokens_BM.device)
        place_BM = starts[:, None] + torch.arange(tokens_BM.shape[1], device=tokens_BM.device)
        x_BMH = self._joined(state_BMH.to(self._weight.dtype), tokens_BM, place_BM)
        query_BMHD = self._cached(x_BMH, place_BM)
        self._lengths = [start + count for start, count in zip(self._lengths, counts, strict=True)]
        row_B = torch.arange(len(counts), device=tokens_BM.device)
        last_B = torch.tensor(counts, device=tokens_BM.device) - 1
        return self._layer(x_BMH[row_B, last_B], query_BMHD[row_B, last_B], 0)

    def _follow(self, feature_BH: Tensor, chosen_B: Tensor, step: int) -> Tensor:
        """A later step: the head reads its own output and the token it chose."""
        state_BH = self._normed(feature_BH, self._draft.norm) if self._rules.feeds_normed else feature_BH
        place_B1 = torch.tensor(self._lengths, device=chosen_B.device)[:, None] + step - 1
        x_B1H = self._joined(state_BH[:, None], chosen_B[:, None], place_B1)
        return self._layer(x_B1H[:, 0], self._cached(x_B1H, place_B1)[:, 0], step)

    def _joined(self, state_BMH: Tensor, tokens_BM: Tensor, place_BM: Tensor) -> Tensor:
        draft = self._draft
        embedded_BMH = F.embedding(tokens_BM, self._head.embedding_VH).to(self._weight.dtype)
        if self._rules.hides_first:
            embedded_BMH = embedded_BMH * (place_BM > 0)[..., None]
        both = [self._normed(state_BMH, draft.hidden_norm), self._normed(embedded_BMH, draft.token_norm)]
        if self._rules.embedding_first:
            both.reverse()
        return F.linear(torch.cat(both, dim=-1), self._weight)

    def _cached(self, x_BMH: Tensor, place_BM: Tensor) -> Tensor:
        """Write rotated k and v at these positions; -> rotated q [B, M, Hq, D].

        Rows with fewer new positions than M write rubbish behind their own, which no mask shows and later writes cover.
        """
        draft, ops = self._draft, self._device.ops
        query, key, value = draft.layer.self_attn.project(x_BMH, draft.layer.input_layernorm, "qkv", ops)
        cos_BMD, sin_BMD = draft.rotary.tables(place_BM, self._weight.dtype)
        row_B1 = torch.arange(len(place_BM), device=place_BM.device)[:, None]
        self._keys[row_B1, place_BM] = ops.rotary(key, cos_BMD, sin_BMD)
        self._values[row_B1, place_BM] = value
        return ops.rotary(query, cos_BMD, sin_BMD)

    def _layer(self, x_BH: Tensor, query_BHD: Tensor, step: int) -> Tensor:
        """Attention over everything cached up to this step, then the MLP; -> the layer's output [B, H]."""
        layer = self._draft.layer
        ends = [length + step for length in self._lengths]
        longest = max(ends)
        if min(ends) == longest:
            mask = MaskSpec.full()
        else:
            end_BQ = torch.tensor(ends)[:, None]
            mask = MaskSpec.limits(torch.zeros_like(end_BQ), end_BQ)
        keys, values = self._keys[:, :longest], self._values[:, :longest]
        mixed, _ = self._device.attention.forward(query_BHD[:, None], keys, values, mask, self._scale)
        residual_BH = layer.self_attn.add_output(x_BH, mixed[:, 0], self._device.ops)
        out_BH: Tensor = layer.mlp(residual_BH, layer.post_attention_layernorm, self._device.ops)
        return out_BH

    def _normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return norm(x, self._device.ops)  # type: ignore[no-any-return]

    def _reserve(self, positions: int) -> None:
        """Room for so many positions in every row; doubles, so that a decoding copies each key a few times at most."""
        room = self._keys.shape[1]
        if positions > room:
            grown = max(positions, 2 * room, RESERVED)
            self._keys, self._values = (_grown(cache, grown) for cache in (self._keys, self._values))


def _grown(cache_BSHD: Tensor, positions: int) -> Tensor:
    # Zeros: a kernel may multiply a masked value by its weight of 0, and what lay in memory may be no number.
    grown = cache_BSHD.new_zeros(cache_BSHD.shape[0], positions, *cache_BSHD.shape[2:])
    grown[:, : cache_BSHD.shape[1]] = cache_BSHD
    return grown
