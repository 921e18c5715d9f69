"""A micro-batch of the EAGLE-3 unroll: which slots run, what they read, and which (slot, step) pairs are supervised.

Slot i holds the taps of position i and token x_{i+1}; its step k reads token x_{i+1+k} and predicts x_{i+2+k}, whose
distribution the target gives at position i+1+k. The mask belongs to the *predicted* token (docs/concepts.md).

A rank plans and runs the slots that it owns (`core.parallel.shards`); alone, it owns all. What a slot needs beyond its
piece stands in the halo: K rows of last hidden states, K + 1 of tokens, masks and documents.

Shape letters: B rows, T positions of the longest row, S slots that this rank owns, N pieces and L slots of a piece
(S = N L), Q running slots per row, K unroll steps, X = N (L + K), F = taps x target hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchspec.core.algorithms.taught import Pairs, TaughtBatch, TaughtPlan
from torchspec.core.features.rows import PADDING, FeatureRows, TokenRows
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.transfer import fields_to_device
from torchspec.core.parallel.sequence import SequenceGroup
from torchspec.core.parallel.shards import Layout

DENSE = 0.9
"""Share of running slots above which all of them run."""


def halo(steps: int) -> int:
    """Rows of last hidden states that a piece reads beyond its own: slot i's last step is taught by row i + K."""
    return steps


@dataclass(frozen=True, kw_only=True)
class OwnRows:
    """The pieces of one rank with K + 1 tokens of halo, on the host; PADDING documents beyond the end."""

    input_ids_BNX: Tensor
    loss_mask_BNX: Tensor
    document_BNX: Tensor
    piece_length: int
    steps: int

    @classmethod
    def of(cls, tokens: TokenRows, layout: Layout, rank: int, steps: int) -> OwnRows:
        return cls(
            input_ids_BNX=layout.cut(tokens.input_ids_BT, rank, steps + 1),
            loss_mask_BNX=layout.cut(tokens.loss_mask_BT, rank, steps + 1, fill=False),
            document_BNX=layout.cut(tokens.document_BT, rank, steps + 1, fill=PADDING),
            piece_length=layout.piece_length,
            steps=steps,
        )

    @property
    def document_BS(self) -> Tensor:
        return self.document_BNX[:, :, : self.piece_length].flatten(1)

    def supervised_BSK(self) -> Tensor:
        """Whether slot i predicts, at step k, a supervised token of its own document."""
        length = self.piece_length
        here_BNL = self.document_BNX[:, :, :length]
        steps = []
        for step in range(self.steps):
            ahead = slice(step + 2, step + 2 + length)
            steps.append(self.loss_mask_BNX[:, :, ahead] & (self.document_BNX[:, :, ahead] == here_BNL))
        # A mask that says True on padding supervises nothing.
        return (torch.stack(steps, dim=-1) & (here_BNL != PADDING)[..., None]).flatten(1, 2)

    def predicted_BSK(self) -> Tensor:
        """The token that slot i predicts at step k."""
        length = self.piece_length
        steps = [self.input_ids_BNX[:, :, step + 2 : step + 2 + length] for step in range(self.steps)]
        return torch.stack(steps, dim=-1).flatten(1, 2)

    def pairs(self, supervised_BSK: Tensor, rows: FeatureRows, slot: Callable[[Tensor, Tensor, int], Tensor]) -> Pairs:
        """Slot i's step 0 is taught by the next row, which may lie in the halo; `slot` as in `Pairs.of`."""
        last_rows, document_BS = rows.last_BXH.shape[1], self.document_BS
        teacher_BS = (rows.layout.among(torch.arange(rows.layout.rows), last_rows) + 1).expand_as(document_BS)
        return Pairs.of(supervised_BSK, self.predicted_BSK(), document_BS, teacher_BS, last_rows, slot)


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The owned slots that run the unroll, index_BQ; rows with fewer repeat their last one, unsupervised.

    whole     they are all S slots in order, so that rows are views instead of copies
    pieces    how many pieces the slots make up, of `length` slots each
    """

    index_BQ: Tensor
    whole: bool
    pieces: int
    length: int

    def take(self, x_BXZ: Tensor, ahead: int = 0) -> Tensor:
        """The rows `ahead` of each slot, [B, Q, Z]; every piece of x has at least L + `ahead` of them."""
        if self.whole:
            return self.every(x_BXZ, ahead)
        batch, rows = x_BXZ.shape[:2]
        index_BQ = self.index_BQ
        if self.pieces > 1:
            index_BQ = index_BQ + index_BQ // self.length * (rows // self.pieces - self.length)
        first_B = torch.arange(ahead, ahead + batch * rows, rows, device=x_BXZ.device)
        flat_Q = (index_BQ + first_B[:, None]).flatten()
        return x_BXZ.flatten(0, 1).index_select(0, flat_Q).view(*index_BQ.shape, -1)

    def every(self, x_BXZ: Tensor, ahead: int = 0) -> Tensor:
        """The rows `ahead` of every owned slot, [B, S, Z], whether it runs or not."""
        if self.pieces == 1:
            return x_BXZ[:, ahead : ahead + self.length]
        x_BNXZ = x_BXZ.view(x_BXZ.shape[0], self.pieces, -1, x_BXZ.shape[2])
        return x_BNXZ[:, :, ahead : ahead + self.length].flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class UnrollInputs:
    """What the draft reads, on the device.

    tokens_BX     the following tokens: in each piece, slot i's is the one at i + 1; stand-ins stand behind the end
    taps_BSF      the target's taps, concatenated in tap order
    angles_A      rotary positions that occur at any step, ascending
    turn_BS       place of each slot's rotary position at step 0 among them (positions restart with each document)
    own_BQ        those of the running slots
    mask          which step-0 keys each running slot sees (with its peers', `SequenceGroup.peers`); its limits are on
                  the host, where attention is planned
    """

    tokens_BX: Tensor
    taps_BSF: Tensor
    angles_A: Tensor
    turn_BS: Tensor
    own_BQ: Tensor
    slots: Slots
    mask: MaskSpec
    layout: Layout
    sequence: SequenceGroup | None


@dataclass(frozen=True, kw_only=True)
class Batch(TaughtBatch):
    """One micro-batch on the device."""

    inputs: UnrollInputs


def running_slots(peers: Sequence[Tensor]) -> list[tuple[Slots, Tensor]]:
    """Of each peer's `supervised_BSK`: the slots with any supervised step, packed to the left, and each slot's rank_BS.

    Only step-0 keys of the others are ever looked at, so nothing else of them is computed. Where few would be left
    out all run: copying rows to and fro costs more. All peers run the same number Q >= 1, since they exchange them.
    """
    running = [supervised_BSK.any(-1) for supervised_BSK in peers]
    slots = running[0].shape[1]
    place_BS = torch.arange(slots).expand_as(running[0])
    if sum(int(runs_BS.sum()) for runs_BS in running) >= DENSE * sum(runs_BS.numel() for runs_BS in running):
        return [(Slots(index_BQ=place_BS, whole=True, pieces=1, length=slots), place_BS) for _ in peers]
    counts = [runs_BS.sum(-1) for runs_BS in running]
    queries = max(1, *(int(count_B.max()) for count_B in counts))
    found = []
    for runs_BS, count_B in zip(running, counts, strict=True):
        order_BS = torch.argsort(~runs_BS, dim=1, stable=True)
        last_B = (count_B - 1).clamp_min(0)
        index_BQ = order_BS.gather(1, torch.minimum(torch.arange(queries)[None], last_B[:, None]))
        found.append((Slots(index_BQ=index_BQ, whole=False, pieces=1, length=slots), runs_BS.long().cumsum(1) - 1))
    return found


@dataclass(frozen=True, kw_only=True)
class Plan(TaughtPlan):
    """How a micro-batch is to be run: with so many unroll steps."""

    steps: int


def build_batch(rows: FeatureRows, plan: Plan) -> Batch:
    """Plan this rank's rows on the CPU and move the plan and the features to the device.

    A document too short to predict anything has no supervised pair. Without any, one slot per row runs all the same.
    """
    tokens, layout, device = rows.tokens, rows.layout, plan.device
    peers = [rows.rank] if rows.sequence is None else list(rows.sequence.peers)
    theirs = {rank: OwnRows.of(tokens, layout, rank, plan.steps) for rank in peers}
    ran = running_slots([theirs[rank].supervised_BSK() for rank in peers])
    slots, rank_BS = ran[peers.index(rows.rank)]
    slots = replace(slots, pieces=layout.pieces_per_rank, length=layout.piece_length)
    own, queries = theirs[rows.rank], slots.index_BQ.shape[1]
    pairs = own.pairs(own.supervised_BSK(), rows, lambda b, i, _: b * queries + rank_BS[b, i])
    inputs = UnrollInputs(
        tokens_BX=own.input_ids_BNX[:, :, :-1].flatten(1),
        taps_BSF=rows.taps_BSF,
        **_rotations(tokens, layout, rows.rank, slots, plan.steps),
        slots=fields_to_device(slots, device),
        mask=_mask(tokens, layout, {rank: ran[n][0] for n, rank in enumerate(peers)}),
        layout=layout,
        sequence=rows.sequence,
    )
    return Batch(inputs=fields_to_device(inputs, device), **plan.taught(rows, pairs))


def _rotations(tokens: TokenRows, layout: Layout, rank: int, slots: Slots, steps: int) -> dict[str, Tensor]:
    """A slot turns by its position in its document, and by one more at each step; of padding, by anything."""
    position_BT = torch.arange(tokens.length) - tokens.starts_BT
    position_BS = layout.cut(position_BT, rank).flatten(1)
    angles_A = torch.unique(torch.unique(position_BS)[:, None] + torch.arange(steps))
    turn_BS = torch.searchsorted(angles_A, position_BS)
    return {"angles_A": angles_A, "turn_BS": turn_BS, "own_BQ": turn_BS.gather(1, slots.index_BQ)}


def _mask(tokens: TokenRows, layout: Layout, slots: dict[int, Slots]) -> MaskSpec:
    """Causal within the slot's document; the plain form where each row is one document and all its slots run here.

    Limits are positions of the whole sequence; padding sees nothing.
    """
    first_BT = tokens.document_BT[:, :1]
    alone = layout.ranks == 1
    whole = alone and all(peer.whole for peer in slots.values())
    if whole and bool(((tokens.document_BT == first_BT) | (tokens.document_BT == PADDING)).all()):
        return MaskSpec.causal()
    starts, ends = [], []
    for rank, peer in slots.items():
        start_BS = layout.cut(tokens.starts_BT, rank).flatten(1)
        real_BS = layout.cut(tokens.document_BT, rank, fill=PADDING).flatten(1) != PADDING
        end_BS = torch.where(real_BS, layout.positions(rank) + 1, start_BS)
        starts.append(start_BS.gather(1, peer.index_BQ))
        ends.append(end_BS.gather(1, peer.index_BQ))
    return MaskSpec.limits(torch.cat(starts, dim=1), torch.cat(ends, dim=1))
