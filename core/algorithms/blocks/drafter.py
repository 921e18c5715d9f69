"""Drafting a block at once, with the context's keys and values kept: the training pass over one block per sequence.

Shape letters: B sequences, M newly confirmed positions, S kept positions, Z slots of a block, K steps of a block,
L drafted tokens, H hidden size, N draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from torchspec.core.algorithms.blocks.batch import BlockInputs
from torchspec.core.algorithms.blocks.body import BlockDraft, BlockLayer, Shared
from torchspec.core.attention.forms import AttentionForm
from torchspec.core.interfaces.algorithm import Proposal
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.parallel.shards import Layout

ROOM = 256


class BlockDrafter:
    """Implements `Drafter`."""

    def __init__(self, draft: BlockDraft, head: TargetHead, device: Device, taps: tuple[int, ...]) -> None:
        self.draft, self.head, self.device, self.taps = draft, head, device, taps
        dtype = draft.norm.weight.dtype
        self.rows_NH, _ = draft.target_rows.rows(head, draft.vocabulary, dtype, "tokens")

    def open(self, batch_size: int) -> BlockSession:
        return BlockSession(self, batch_size)


class BlockSession:
    """Implements `DraftSession`."""

    def __init__(self, drafter: BlockDrafter, batch_size: int) -> None:
        self._drafter = drafter
        draft, weight = drafter.draft, drafter.draft.fc.weight
        geometry = draft.geometry
        self._lengths = [0] * batch_size
        shape = (batch_size, 0, geometry.num_key_value_heads, geometry.head_dim)
        self._caches = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in draft.layers]

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
        """See `DraftSession.propose`: a block drafts `BlockShape.steps` tokens at most."""
        self._confirm(taps)
        anchor_B = torch.stack([tokens[-1] for tokens in next_tokens])
        length = min(length, self._drafter.draft.geometry.block.steps)
        if length == 0:
            return Proposal(tokens_BL=anchor_B.new_empty(len(anchor_B), 0))
        normed_BKH = self._block(anchor_B)[:, :length]
        return self._choose(normed_BKH, anchor_B, temperature, generator)

    def keep(self, rows: Sequence[int]) -> None:
        """See `DraftSession.keep`."""
        self._lengths = [self._lengths[row] for row in rows]
        with torch.inference_mode():
            self._caches = [(key[list(rows)], value[list(rows)]) for key, value in self._caches]

    def _confirm(self, taps: Sequence[Tensor]) -> None:
        """Keep every layer's keys and values of the newly confirmed positions.

        Rows with fewer of them write rubbish behind their own, which no mask shows and later writes cover.
        """
        draft, device = self._drafter.draft, self._drafter.device
        dtype = draft.fc.weight.dtype
        starts = self._lengths
        self._lengths = [start + len(tap) for start, tap in zip(starts, taps, strict=True)]
        taps_BMF = pad_sequence([tap.flatten(1).to(dtype) for tap in taps], batch_first=True)
        count = taps_BMF.shape[1]
        features_BMH = draft.hidden_norm(draft.fc(taps_BMF), device.ops)
        place_BM = torch.tensor(starts, device=taps_BMF.device)[:, None] + torch.arange(count, device=taps_BMF.device)
        shared = self._shared(turn_BS=place_BM)
        self._reserve(max(starts) + count)
        row_B1 = torch.arange(len(starts), device=taps_BMF.device)[:, None]
        for layer, cache in zip(self._layers(), self._caches, strict=True):
            for kept, new in zip(cache, layer.context(features_BMH, shared), strict=True):
                kept[row_B1, place_BM] = new

    def _block(self, anchor_B: Tensor) -> Tensor:
        """[B, K, H]: the steps' outputs after the final norm."""
        draft, device, lengths = self._drafter.draft, self._drafter.device, self._lengths
        shape = draft.geometry.block
        tokens_BZ = anchor_B.new_full((len(anchor_B), shape.size), shape.mask_token)
        tokens_BZ[:, 0] = anchor_B
        slot_BZ = torch.tensor(lengths, device=anchor_B.device)[:, None] + torch.arange(
            shape.size, device=anchor_B.device
        )
        shared = self._shared(own_BQ=slot_BZ)
        longest = max(lengths)
        x_BZH = F.embedding(tokens_BZ, self._drafter.head.embedding_VH).to(draft.fc.weight.dtype)
        for layer, (key, value) in zip(self._layers(), self._caches, strict=True):
            x_BZH = layer(shared, x_BZH, key[:, :longest], value[:, :longest])
        normed_BKH: Tensor = draft.norm(x_BZH[:, shape.first_slot :], device.ops)
        return normed_BKH

    def _choose(
        self, normed_BKH: Tensor, anchor_B: Tensor, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """All steps at once, or one after the other where a correction reads the token before."""
        correction = self._drafter.draft.correction
        if correction is None:
            return self._proposal(*pick(self._logits(normed_BKH), temperature, generator))
        map_XN = correction.map_NX.T
        token_B, state = anchor_B, None
        chosen, probs = [], []
        for normed_BH in normed_BKH.unbind(1):
            extra_BX, state = correction.follow(state, normed_BH, token_B, self._drafter.head.embedding_VH)
            logits_BN = self._logits(normed_BH)
            index_B, probs_BN = pick(logits_BN + (extra_BX @ map_XN).to(logits_BN.dtype), temperature, generator)
            token_B = self._drafter.draft.vocabulary.ids_N[index_B]
            chosen.append(index_B)
            probs += [] if probs_BN is None else [probs_BN]
        return self._proposal(torch.stack(chosen, 1), torch.stack(probs, 1) if probs else None)

    def _logits(self, normed: Tensor) -> Tensor:
        logits = normed @ self._drafter.rows_NH.T
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _proposal(self, index_BL: Tensor, probs_BLN: Tensor | None) -> Proposal:
        vocabulary = self._drafter.draft.vocabulary
        if probs_BLN is not None and vocabulary.size < vocabulary.target_size:
            whole_BLV = probs_BLN.new_zeros(*probs_BLN.shape[:2], vocabulary.target_size)
            probs_BLN = whole_BLV.index_copy_(2, vocabulary.ids_N, probs_BLN)
        return Proposal(tokens_BL=vocabulary.ids_N[index_BL], probs_BLV=probs_BLN)

    def _shared(self, turn_BS: Tensor | None = None, own_BQ: Tensor | None = None) -> Shared:
        """What a layer reads: tables of just these positions, and each block's view of the context."""
        draft, device = self._drafter.draft, self._drafter.device
        positions = turn_BS if own_BQ is None else own_BQ
        assert positions is not None
        angles_P, place = torch.unique(positions, return_inverse=True)
        layout = Layout(length=1)
        length_B1 = torch.tensor(self._lengths)[:, None]
        masks = {layer.kind: layer.mask.context(length_B1, torch.zeros_like(length_B1)) for layer in self._layers()}
        inputs = BlockInputs(
            tokens_BQ=place, before_BAK=place, taps_BSF=place, angles_P=angles_P, turn_BS=place, own_BQ=place,
            masks=masks, layout=layout, sequence=None,
        )  # fmt: skip
        form = AttentionForm(attention=device.attention, layout=layout)
        tables_PD = draft.rotary.tables(angles_P, draft.fc.weight.dtype)
        return Shared(inputs=inputs, device=device, form=form, tables_PD=tables_PD)

    def _layers(self) -> list[BlockLayer]:
        return list(self._drafter.draft.layers)  # type: ignore[arg-type]

    def _reserve(self, positions: int) -> None:
        """Room for so many positions in every row; doubles, so that a decoding copies each key a few times at most."""
        room = self._caches[0][0].shape[1]
        if positions > room:
            more = max(positions, 2 * room, ROOM) - room
            # Zeros: a kernel may multiply a masked value by its weight of 0, and what lay in memory may be no number.
            self._caches = [
                (F.pad(key, (0, 0, 0, 0, 0, more)), F.pad(value, (0, 0, 0, 0, 0, more))) for key, value in self._caches
            ]


def pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    """(index [...] of the best token, or of one drawn, and then the distribution it was drawn from), of [..., N]."""
    if temperature == 0:
        return logits.argmax(-1), None
    probs = torch.softmax(logits / temperature, -1)
    drawn = torch.multinomial(probs.flatten(0, -2), 1, generator=generator)
    return drawn.view(probs.shape[:-1]), probs
