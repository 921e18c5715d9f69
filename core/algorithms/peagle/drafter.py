"""K tokens from one pass, with a key/value cache: the training forward of the newest slots and one anchor's depths.

Behind the newest slot come masks, one for each further token. A mask sees the slots up to the newest and the masks
before it, so all of it is causal attention over one run of positions. What slots wrote in each layer is kept: it
depends on slots alone. What masks wrote is overwritten by the next round.

Shape letters: B sequences, M newly confirmed positions, L drafted tokens, R = M + L - 1 rows of a pass, S cached
positions, H draft hidden size, D head size, F = taps x target hidden size, N draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchspec.core.algorithms.peagle.model import PEagleDraft
from torchspec.core.interfaces.algorithm import Proposal
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.interfaces.target import TargetHead


class PEagleDrafter:
    """Implements `Drafter` with the parameters that the draft holds when sessions draft."""

    def __init__(self, draft: PEagleDraft, head: TargetHead, device: Device, taps: tuple[int, ...]) -> None:
        self.taps = taps
        self._draft, self._embedding_VH, self._device = draft, head.embedding_VH, device

    def open(self, batch_size: int) -> PEagleSession:
        return PEagleSession(self._draft, self._embedding_VH, self._device, batch_size)


class PEagleSession:
    """Implements `DraftSession`. Drafts of more tokens than the draft was trained for are made, and worth little."""

    def __init__(self, draft: PEagleDraft, embedding_VH: Tensor, device: Device, batch_size: int) -> None:
        self._draft, self._embedding_VH, self._device = draft, embedding_VH, device
        geometry = draft.geometry
        self._lengths = [0] * batch_size
        # [layers, keys and values, B, S, heads, D]
        self._cache = draft.fc.weight.new_empty(
            geometry.num_layers, 2, batch_size, 0, geometry.num_key_value_heads, geometry.head_dim
        )

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
        """See `DraftSession.propose`. Each token is drawn for itself: its distribution depends on no other drafted."""
        logits_BLN = self._pass(taps, next_tokens, length)
        if not length:
            return Proposal(tokens_BL=next_tokens[0].new_empty(len(next_tokens), 0))
        ids_N = self._draft.vocabulary.ids_N
        if temperature == 0.0:
            return Proposal(tokens_BL=ids_N[logits_BLN.max(-1).indices])
        wide = torch.promote_types(logits_BLN.dtype, torch.float32)
        probs_BLN = torch.softmax(logits_BLN.to(wide) / temperature, -1)
        chosen = torch.multinomial(probs_BLN.flatten(0, 1), 1, generator=generator)
        return Proposal(tokens_BL=ids_N[chosen.view(probs_BLN.shape[:2])], probs_BLV=self._whole(probs_BLN))

    def keep(self, rows: Sequence[int]) -> None:
        """See `DraftSession.keep`."""
        self._lengths = [self._lengths[row] for row in rows]
        with torch.inference_mode():
            self._cache = self._cache[:, :, list(rows)]

    def _pass(self, taps: Sequence[Tensor], next_tokens: Sequence[Tensor], length: int) -> Tensor:
        """Logits [B, L, N] of the tokens behind the newest; every layer's keys of the new positions are kept."""
        draft, ops = self._draft, self._device.ops
        counts = [tokens.numel() for tokens in next_tokens]
        x_BRH, embedded = self._rows(taps, next_tokens, counts, max(0, length - 1))
        embedded_BRH: Tensor | None = embedded
        place_BR = torch.tensor(self._lengths)[:, None] + torch.arange(x_BRH.shape[1])
        self._lengths = [start + count for start, count in zip(self._lengths, counts, strict=True)]
        self._reserve(int(place_BR.max()) + 1)
        # The newest slot and the masks behind it; all that the last layer is asked for.
        last_BL = torch.tensor(counts)[:, None] - 1 + torch.arange(length)
        tables = draft.rotary.tables(place_BR.to(x_BRH.device), x_BRH.dtype)
        *before, final = draft.every_layer()
        for number, layer in enumerate(before):
            query, keys, values = self._cached(number, x_BRH, embedded_BRH, place_BR, tables)
            x_BRH = layer.finish(x_BRH, self._attend(query, keys, values, place_BR), ops)
            embedded_BRH = None
        query, keys, values = self._cached(len(before), x_BRH, embedded_BRH, place_BR, tables)
        if not length:
            return query
        row_B1 = torch.arange(len(counts))[:, None]
        mixed = self._attend(query[row_B1, last_BL], keys, values, place_BR[row_B1, last_BL])
        x_BLH = final.finish(x_BRH[row_B1, last_BL], mixed, ops)
        logits_BLN: Tensor = draft.lm_head(draft.norm(x_BLH, ops))
        return logits_BLN

    def _rows(
        self, taps: Sequence[Tensor], next_tokens: Sequence[Tensor], counts: list[int], masks: int
    ) -> tuple[Tensor, Tensor]:
        """(features, embeddings) [B, R, H]: each sequence's news, then masks; where others have more news, more."""
        draft, rows = self._draft, max(counts) + masks
        feature_11H, embedded_11H = draft.masks(self._embedding_VH)
        taps_BMF = pad_sequence([tap.flatten(1) for tap in taps], batch_first=True).to(feature_11H.dtype)
        tokens_BM = pad_sequence(list(next_tokens), batch_first=True)
        found = []
        for mask_11H, news_BMH in ((feature_11H, draft.fc(taps_BMF)), (embedded_11H, self._embedded(tokens_BM))):
            rows_BRH = mask_11H.repeat(len(counts), rows, 1)
            for row, count in enumerate(counts):
                rows_BRH[row, :count] = news_BMH[row, :count]
            found.append(rows_BRH)
        return found[0], found[1]

    def _embedded(self, tokens_BM: Tensor) -> Tensor:
        return self._draft.embedded(tokens_BM, self._embedding_VH)

    def _cached(
        self,
        number: int,
        x_BRH: Tensor,
        embedded_BRH: Tensor | None,
        place_BR: Tensor,
        tables_BRD: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(a layer's queries, and its keys and values up to the last place) with those of the new rows written.

        Rows behind a sequence's masks write rubbish, which no mask shows and later writes cover.
        """
        layer, ops = list(self._draft.every_layer())[number], self._device.ops
        query, key, value = layer.heads(x_BRH, embedded_BRH, layer.maps(), ops)
        query, key = (ops.rotary(part, *tables_BRD) for part in (query, key))
        row_B1 = torch.arange(len(place_BR))[:, None]
        keys, values = self._cache[number]
        keys[row_B1, place_BR], values[row_B1, place_BR] = key, value
        seen = int(place_BR.max()) + 1
        return query, keys[:, :seen], values[:, :seen]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, place_BR: Tensor) -> Tensor:
        """Each row sees its own place and those before it."""
        mask = MaskSpec.limits(torch.zeros_like(place_BR), place_BR + 1)
        mixed, _ = self._device.attention.forward(query, keys, values, mask, query.shape[-1] ** -0.5)
        return mixed

    def _reserve(self, positions: int) -> None:
        """Room for so many positions; doubles, so that a decoding copies each key a few times at most."""
        room = self._cache.shape[3]
        if positions > room:
            shape = list(self._cache.shape)
            shape[3] = max(positions, 2 * room, 256)
            # Zeros: a kernel may multiply a masked value by its weight of 0, and what lay in memory may be no number.
            grown = self._cache.new_zeros(shape)
            grown[:, :, :, :room] = self._cache
            self._cache = grown

    def _whole(self, probs_BLN: Tensor) -> Tensor:
        """Probabilities over the target vocabulary [B, L, V]; zero for tokens the draft cannot say."""
        if probs_BLN.shape[-1] == self._draft.geometry.vocab_size:
            return probs_BLN
        whole_BLV = probs_BLN.new_zeros(*probs_BLN.shape[:2], self._draft.geometry.vocab_size)
        return whole_BLV.index_copy_(2, self._draft.vocabulary.ids_N, probs_BLN)
