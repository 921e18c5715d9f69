"""A micro-batch of blocks: where they stand, what their slots read, and which (block, step) pairs are supervised.

A rank runs the blocks whose anchors it owns (`core.parallel.shards`); alone, it owns all. What teaches a block's later
steps stands in the halo of last hidden states; tokens are whole on every rank's host.

Shape letters: B rows, T positions of the longest row, S positions that this rank owns, A blocks of a row, Z slots of a
block, Q = A Z, K steps of a block, F = taps x target hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.core.algorithms.blocks.anchors import draw_anchors
from torchspec.core.algorithms.taught import Pairs, TaughtBatch, TaughtPlan
from torchspec.core.attention.block import BlockMask
from torchspec.core.features.rows import PADDING, FeatureRows, TokenRows
from torchspec.core.interfaces.algorithm import Moment
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.transfer import fields_to_device, to_device
from torchspec.core.parallel.sequence import SequenceGroup
from torchspec.core.parallel.shards import Layout


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """`size` slots, of which the first predicts too if `sample_from_anchor`; `mask_token` is in the others."""

    size: int
    mask_token: int
    sample_from_anchor: bool = False

    @property
    def steps(self) -> int:
        """Tokens that a block drafts, K."""
        return self.size if self.sample_from_anchor else self.size - 1

    @property
    def first_slot(self) -> int:
        """The slot of step 0."""
        return self.size - self.steps

    @property
    def halo(self) -> int:
        """Rows of last hidden states beyond a piece: step s of anchor a is taught by row a + s."""
        return self.steps - 1


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of one rank, packed to the left.

    place_BA       index of the anchor among the rank's positions
    anchor_BA      its position in the row
    first_BA       first position of its document
    real_BA        False where a row has fewer blocks: stand-ins at position 0 that see no context
    """

    place_BA: Tensor
    anchor_BA: Tensor
    first_BA: Tensor
    real_BA: Tensor

    @classmethod
    def of(cls, chosen_BT: Tensor, tokens: TokenRows, layout: Layout, rank: int, count: int) -> Blocks:
        """Of the row's anchors those that the rank owns, filled up to `count` blocks in every row."""
        chosen_BS = layout.cut(chosen_BT, rank, fill=False).flatten(1)
        place_BA = torch.argsort(~chosen_BS, dim=1, stable=True)[:, :count]
        if place_BA.shape[1] < count:
            place_BA = torch.nn.functional.pad(place_BA, (0, count - place_BA.shape[1]))
        real_BA = torch.arange(count)[None] < chosen_BS.sum(1, keepdim=True)
        place_BA = place_BA.where(real_BA, 0)
        anchor_BA = layout.positions(rank)[place_BA].where(real_BA, 0)
        first_BA = tokens.starts_BT.gather(1, anchor_BA)
        return cls(place_BA=place_BA, anchor_BA=anchor_BA, first_BA=first_BA.where(real_BA, 0), real_BA=real_BA)

    @property
    def count(self) -> int:
        return self.anchor_BA.shape[1]

    def ahead(self, x_BT: Tensor, first: int, steps: int, fill: Any) -> Tensor:
        """[B, A, steps]: what stands `first`, `first` + 1, ... positions behind each anchor, `fill` beyond the end."""
        place_BAK = self.anchor_BA[..., None] + first + torch.arange(steps)
        inside_BAK = place_BAK < x_BT.shape[1]
        flat_BX = place_BAK.clamp_max(x_BT.shape[1] - 1).flatten(1)
        return x_BT.gather(1, flat_BX).view(place_BAK.shape).masked_fill(~inside_BAK, fill)

    def pairs(self, rows: FeatureRows, steps: int, gaps: bool) -> Pairs:
        """The supervised (block, step) pairs: step 0 is taught by the anchor's own row. Without `gaps` a block's
        supervision ends with its first token that has none."""
        tokens, count, last_rows = rows.tokens, self.count, rows.last_BXH.shape[1]
        document_BA = tokens.document_BT.gather(1, self.anchor_BA)
        document_BAK = self.ahead(tokens.document_BT, 1, steps, PADDING)
        supervised_BAK = self.ahead(tokens.loss_mask_BT, 1, steps, False)
        supervised_BAK &= (document_BAK == document_BA[..., None]) & self.real_BA[..., None]
        if not gaps:
            supervised_BAK = supervised_BAK.cumprod(-1).bool()
        return Pairs.of(
            supervised_BAK,
            self.ahead(tokens.input_ids_BT, 1, steps, 0),
            document_BA,
            rows.layout.among(self.place_BA, last_rows),
            last_rows,
            lambda b, a, _: b * count + a,
        )


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """What the draft reads, on the device.

    tokens_BQ     of the slots: each block's anchor, then masks
    before_BAK    the token before the one that each step predicts, of the text itself
    taps_BSF      the target's taps of this rank's positions, concatenated in tap order
    angles_P      rotary positions that occur, ascending
    turn_BS       place of each position's rotary position among them (positions restart with each document)
    own_BQ        those of the slots
    masks         of each kind of layer, "full" and "sliding": which context keys the slots see (with the peers',
                  `SequenceGroup.peers`), limits on the host
    """

    tokens_BQ: Tensor
    before_BAK: Tensor
    taps_BSF: Tensor
    angles_P: Tensor
    turn_BS: Tensor
    own_BQ: Tensor
    masks: dict[str, MaskSpec]
    layout: Layout
    sequence: SequenceGroup | None


@dataclass(frozen=True, kw_only=True)
class Batch(TaughtBatch):
    """One micro-batch on the device; every eligible anchor was taken at `whole_BT`'s positions."""

    blocks: Blocks
    inputs: BlockInputs
    whole_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class Plan(TaughtPlan):
    """How a micro-batch is to be run: the most anchors of a document, the context masks of the kinds of layers, and
    whether a block goes on to be supervised behind a token that is not (`gaps`)."""

    shape: BlockShape
    masks: dict[str, BlockMask]
    anchors: int
    gaps: bool = True


def build_batch(rows: FeatureRows, plan: Plan, moment: Moment) -> Batch:
    """Plan this rank's blocks on the CPU and move the plan and the features to the device.

    Without any anchor one stand-in block per row runs all the same, unsupervised: parameters must be used.
    """
    tokens, layout, shape, device = rows.tokens, rows.layout, plan.shape, plan.device
    chosen_BT, whole_BT = draw_anchors(tokens, moment.draws, plan.anchors)
    peers = [rows.rank] if rows.sequence is None else list(rows.sequence.peers)
    counts = [int(layout.cut(chosen_BT, rank, fill=False).flatten(1).sum(1).max()) for rank in peers]
    theirs = {rank: Blocks.of(chosen_BT, tokens, layout, rank, max(1, *counts)) for rank in peers}
    blocks = theirs[rows.rank]
    inputs = BlockInputs(
        tokens_BQ=_slot_tokens(blocks, tokens, shape),
        before_BAK=blocks.ahead(tokens.input_ids_BT, 0, shape.steps, 0),
        taps_BSF=rows.taps_BSF,
        **_rotations(blocks, tokens, layout, rows.rank, shape.size),
        masks={kind: _context(mask, list(theirs.values())) for kind, mask in plan.masks.items()},
        layout=layout,
        sequence=rows.sequence,
    )
    return Batch(
        blocks=fields_to_device(blocks, device),
        inputs=fields_to_device(inputs, device),
        whole_BT=to_device(whole_BT, device),
        **plan.taught(rows, blocks.pairs(rows, shape.steps, plan.gaps)),
    )


def _slot_tokens(blocks: Blocks, tokens: TokenRows, shape: BlockShape) -> Tensor:
    slots_BAZ = torch.full((*blocks.anchor_BA.shape, shape.size), shape.mask_token)
    slots_BAZ[..., 0] = tokens.input_ids_BT.gather(1, blocks.anchor_BA)
    return slots_BAZ.flatten(1)


def _rotations(blocks: Blocks, tokens: TokenRows, layout: Layout, rank: int, size: int) -> dict[str, Tensor]:
    """A context key turns by its position in its document, slot z of a block by its anchor's and z more."""
    position_BT = torch.arange(tokens.length) - tokens.starts_BT
    position_BS = layout.cut(position_BT, rank).flatten(1)
    slot_BQ = ((blocks.anchor_BA - blocks.first_BA)[..., None] + torch.arange(size)).flatten(1)
    angles_P = torch.unique(torch.cat((position_BS.flatten(), slot_BQ.flatten())))
    return {
        "angles_P": angles_P,
        "turn_BS": torch.searchsorted(angles_P, position_BS),
        "own_BQ": torch.searchsorted(angles_P, slot_BQ),
    }


def _context(mask: BlockMask, peers: list[Blocks]) -> MaskSpec:
    """Limits in positions of the whole sequence, of the blocks of all peers."""
    anchors, firsts = ([getattr(peer, name) for peer in peers] for name in ("anchor_BA", "first_BA"))
    return mask.context(torch.cat(anchors, dim=1), torch.cat(firsts, dim=1))
