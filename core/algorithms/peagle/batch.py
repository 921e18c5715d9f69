"""A micro-batch of P-EAGLE: which anchors run at which depth, what they read, and which elements are supervised.

Slot i holds the taps of position i and token x_{i+1}. Element (i, j), anchor i at depth j, predicts x_{i+2+j}, whose
distribution the target gives at position i+1+j. Depth 0 runs every slot, since its keys are read by all later ones;
which others run is drawn (`sampling`).

Anchors go as deep as they go, so a depth's are among those of the depth before. They are kept in one order, deepest
first: of every depth j >= 1 the elements are the first Q_j of it. Where another row has more elements at a depth, some
run that were not drawn; nothing reads them.

A rank plans and runs the slots that it owns (`core.parallel.shards`); alone, it owns all. An anchor's elements are
where the anchor is; what teaches them stands in the halo of last hidden states.

Shape letters: B rows, T positions of the longest row, S slots that this rank owns, Q_j elements of depth j, K depths, M
supervised elements (grouped by depth, then by row and slot), F = taps x target hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.core.algorithms.eagle3.batch import OwnRows
from torchspec.core.algorithms.peagle.sampling import DepthSampling, sample_rows
from torchspec.core.algorithms.taught import Pairs, TaughtBatch, TaughtPlan
from torchspec.core.features.rows import PADDING, FeatureRows, TokenRows
from torchspec.core.interfaces.algorithm import Moment
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.transfer import fields_to_device, to_device
from torchspec.core.parallel.sequence import SequenceGroup
from torchspec.core.parallel.shards import Layout


@dataclass(frozen=True, kw_only=True)
class Elements:
    """Which of a rank's slots run at which depth.

    deepest_BS    the depth to which each goes
    order_BS      the slots, those that go deepest first, then by position
    counts        Q_j of every depth; all S at depth 0
    """

    deepest_BS: Tensor
    order_BS: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of_peers(cls, deepest: Sequence[Tensor], depths: int) -> list[Elements]:
        """Of each peer's `deepest_BS`. All run the same numbers, since they exchange queries, and one at least of each
        depth, since they meet in collectives and every parameter must be used."""
        most = [max(1, *(int((one >= depth).sum(1).max()) for one in deepest)) for depth in range(1, depths)]
        return [
            cls(
                deepest_BS=deepest_BS,
                order_BS=torch.argsort(deepest_BS, dim=1, descending=True, stable=True),
                counts=(deepest_BS.shape[1], *most),
            )
            for deepest_BS in deepest
        ]

    def take(self, x_BS: Tensor, depth: int) -> Tensor:
        """[B, Q_j]: what of every slot belongs to the depth's elements."""
        return x_BS if depth == 0 else x_BS.gather(1, self.order_BS[:, : self.counts[depth]])

    def place(self, row_M: Tensor, slot_M: Tensor, depth: int) -> Tensor:
        """Index of elements into the flattened [B, Q_j]."""
        if depth:
            slot_M = torch.argsort(self.order_BS, dim=1)[row_M, slot_M]
        return row_M * self.counts[depth] + slot_M

    def pairs(self, own: OwnRows, rows: FeatureRows) -> Pairs:
        """The supervised elements."""
        runs_BSK = self.deepest_BS[..., None] >= torch.arange(own.steps)
        return own.pairs(own.supervised_BSK() & runs_BSK, rows, self.place)


@dataclass(frozen=True, kw_only=True)
class DepthInputs:
    """What the draft reads, on the device.

    tokens_BS     of each slot the token that follows it; stand-ins stand behind the end
    taps_BSF      the target's taps, concatenated in tap order
    angles_A      rotary positions that occur at any depth, ascending
    turns         [K] of [B, Q_j]: place of each element's rotary position among them: its anchor's (positions restart
                  with each document) and the depth more
    masks         [K]: which depth-0 keys each depth's elements see (with their peers', `SequenceGroup.peers`); limits
                  are on the host, where attention is planned
    """

    tokens_BS: Tensor
    taps_BSF: Tensor
    angles_A: Tensor
    turns: tuple[Tensor, ...]
    masks: tuple[MaskSpec, ...]
    layout: Layout
    sequence: SequenceGroup | None


@dataclass(frozen=True, kw_only=True)
class Batch(TaughtBatch):
    """One micro-batch on the device.

    deep_BT      anchors of the whole rows that go through all depths
    whole_BT     positions of documents that kept every element
    """

    inputs: DepthInputs
    deep_BT: Tensor
    whole_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class Plan(TaughtPlan):
    """How a micro-batch is to be run: what is drawn."""

    sampling: DepthSampling


def build_batch(rows: FeatureRows, plan: Plan, moment: Moment) -> Batch:
    """Draw, plan this rank's rows on the CPU, and move the plan and the features to the device.

    Every rank draws for the whole rows, and alike. A document too short to predict anything has no supervised element.
    """
    tokens, layout, device, depths = rows.tokens, rows.layout, plan.device, plan.sampling.depths
    deepest_BT, whole_BT = sample_rows(tokens, plan.sampling, moment.draws)
    peers = [rows.rank] if rows.sequence is None else list(rows.sequence.peers)
    ran = Elements.of_peers([layout.cut(deepest_BT, rank).flatten(1) for rank in peers], depths)
    elements = ran[peers.index(rows.rank)]
    own = OwnRows.of(tokens, layout, rows.rank, depths)
    angles_A, turns = _rotations(tokens, layout, rows.rank, elements)
    inputs = DepthInputs(
        tokens_BS=own.input_ids_BNX[:, :, 1 : own.piece_length + 1].flatten(1),
        taps_BSF=rows.taps_BSF,
        angles_A=angles_A,
        turns=tuple(to_device(turn_BQ, device) for turn_BQ in turns),
        masks=_masks(tokens, layout, dict(zip(peers, ran, strict=True)), depths),
        layout=layout,
        sequence=rows.sequence,
    )
    return Batch(
        inputs=fields_to_device(inputs, device),
        deep_BT=to_device(deepest_BT == depths - 1, device),
        whole_BT=to_device(whole_BT, device),
        **plan.taught(rows, elements.pairs(own, rows)),
    )


def _rotations(tokens: TokenRows, layout: Layout, rank: int, elements: Elements) -> tuple[Tensor, list[Tensor]]:
    """(`angles_A`, `turns`) of `DepthInputs`."""
    position_BT = torch.arange(tokens.length) - tokens.starts_BT
    position_BS = layout.cut(position_BT, rank).flatten(1)
    depths = len(elements.counts)
    # The positions behind each one are among them, one after the other.
    angles_A = torch.unique(torch.unique(position_BS)[:, None] + torch.arange(depths))
    turn_BS = torch.searchsorted(angles_A, position_BS)
    return angles_A, [elements.take(turn_BS, depth) + depth for depth in range(depths)]


def _masks(tokens: TokenRows, layout: Layout, peers: dict[int, Elements], depths: int) -> tuple[MaskSpec, ...]:
    """Every element sees the slots up to its anchor in its document; the plain form where a row is one document and
    all its slots run here.

    Limits are positions of the whole sequence; padding sees nothing.
    """
    limits = {}
    for rank in peers:
        start_BS = layout.cut(tokens.starts_BT, rank).flatten(1)
        real_BS = layout.cut(tokens.document_BT, rank, fill=PADDING).flatten(1) != PADDING
        limits[rank] = (start_BS, torch.where(real_BS, layout.positions(rank) + 1, start_BS))
    masks = []
    for depth in range(depths):
        starts, ends = (
            torch.cat([peers[rank].take(limits[rank][side], depth) for rank in peers], dim=1) for side in (0, 1)
        )
        masks.append(MaskSpec.limits(starts, ends))
    first_BT = tokens.document_BT[:, :1]
    if layout.ranks == 1 and bool(((tokens.document_BT == first_BT) | (tokens.document_BT == PADDING)).all()):
        masks[0] = MaskSpec.causal()
    return tuple(masks)
