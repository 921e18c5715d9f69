"""A micro-batch of the EAGLE-3 unroll: which slots run, what they read, and which (slot, step) pairs are supervised.

Slot i holds the taps of position i and token x_{i+1}; its step k reads token x_{i+1+k} and predicts x_{i+2+k}, whose
distribution the target gives at position i+1+k. The mask belongs to the *predicted* token (docs/concepts.md).

Shape letters: B rows, T positions of the longest row, Q running slots per row, K unroll steps, M supervised pairs
(grouped by step, then by row and slot), R target rows (positions that teach at least one pair), F = taps x target
hidden size, H target hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchspec.core.interfaces.features import Features, NormState
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.objectives.chunks import Chunk, plan_chunks

Planned = TypeVar("Planned", "Rows", "Pairs")

PADDING = -1
"""The document of positions behind a row's end."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Right-padded token rows. Documents are numbered over the whole micro-batch, in contiguous runs."""

    input_ids_BT: Tensor
    loss_mask_BT: Tensor
    document_BT: Tensor

    @classmethod
    def one_document_each(cls, input_ids: Sequence[Tensor], loss_masks: Sequence[Tensor]) -> Rows:
        documents = [torch.full_like(ids_T, row) for row, ids_T in enumerate(input_ids)]
        return cls(
            input_ids_BT=pad_sequence(list(input_ids), batch_first=True),
            loss_mask_BT=pad_sequence([mask_T.bool() for mask_T in loss_masks], batch_first=True),
            document_BT=pad_sequence(documents, batch_first=True, padding_value=PADDING),
        )

    @property
    def starts_BT(self) -> Tensor:
        """First position of each position's document."""
        place_T = torch.arange(self.document_BT.shape[1]).expand_as(self.document_BT)
        fresh_BT = torch.ones_like(self.document_BT, dtype=torch.bool)
        fresh_BT[:, 1:] = self.document_BT[:, 1:] != self.document_BT[:, :-1]
        return torch.where(fresh_BT, place_T, 0).cummax(dim=1).values

    def supervised_BTK(self, steps: int) -> Tensor:
        """Whether slot i predicts, at step k, a supervised token of its own document."""
        length = self.document_BT.shape[1]
        supervised_BTK = torch.zeros(*self.document_BT.shape, steps, dtype=torch.bool)
        for step in range(min(steps, length - 2)):
            ahead = step + 2
            same_BT = self.document_BT[:, ahead:] == self.document_BT[:, :-ahead]
            supervised_BTK[:, :-ahead, step] = self.loss_mask_BT[:, ahead:] & same_BT
        # A mask that says True on padding supervises nothing.
        return supervised_BTK & (self.document_BT != PADDING)[..., None]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The supervised (slot, step) pairs and the target rows that teach them.

    slot_M      index of the pair's slot into the flattened [B, Q]
    cell_M      index of the pair into the flattened [B, T, K]
    row_M       its target row; ascending within a step
    document_M  its document
    position_R  index of each target row into the flattened [B, T]; ascending
    sizes       pairs of each step; they sum to M
    """

    slot_M: Tensor
    cell_M: Tensor
    row_M: Tensor
    document_M: Tensor
    position_R: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, supervised_BTK: Tensor, rank_BT: Tensor, queries: int, document_BT: Tensor) -> Pairs:
        rows, length, steps = supervised_BTK.shape
        # A pair (i, k) shares its target position i + 1 + k with (i + k, 0), which is then supervised as well.
        first_BT = supervised_BTK[:, :, 0]
        row_BT = (first_BT.flatten().long().cumsum(0) - 1).view(rows, length)
        found = [supervised_BTK[:, :, step].nonzero(as_tuple=True) for step in range(steps)]
        row_B, slot_B = first_BT.nonzero(as_tuple=True)
        return cls(
            slot_M=torch.cat([b * queries + rank_BT[b, i] for b, i in found]),
            cell_M=torch.cat([(b * length + i) * steps + step for step, (b, i) in enumerate(found)]),
            row_M=torch.cat([row_BT[b, i + step] for step, (b, i) in enumerate(found)]),
            document_M=torch.cat([document_BT[b, i] for b, i in found]),
            position_R=row_B * length + slot_B + 1,
            sizes=tuple(b.numel() for b, _ in found),
        )


@dataclass(frozen=True, kw_only=True)
class UnrollInputs:
    """What the draft reads, on the device.

    tokens_BT     token ids
    taps_BTF      the target's taps, concatenated in tap order
    position_BT   rotary positions, restarting with each document
    slots_BQ      the slots that run the unroll; rows with fewer repeat their last one, unsupervised
    mask          which step-0 keys each running slot sees
    """

    tokens_BT: Tensor
    taps_BTF: Tensor
    position_BT: Tensor
    slots_BQ: Tensor
    mask: MaskSpec


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on the device. `last_RH` are the target's last hidden states at the teaching positions."""

    rows: Rows
    inputs: UnrollInputs
    pairs: Pairs
    chunks: tuple[Chunk, ...]
    last_RH: Tensor
    norm_state: NormState
    documents: int


def running_slots(supervised_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """The slots with any supervised step, packed to the left: slots_BQ (Q >= 1) and each slot's rank_BT in it.

    Only step-0 keys of the others are ever looked at, so nothing else of them is computed.
    """
    runs_BT = supervised_BTK.any(-1)
    count_B = runs_BT.sum(-1)
    queries = max(1, int(count_B.max()))
    order_BT = torch.argsort(~runs_BT, dim=1, stable=True)
    last_B = (count_B - 1).clamp_min(0)
    slots_BQ = order_BT.gather(1, torch.minimum(torch.arange(queries)[None], last_B[:, None]))
    return slots_BQ, runs_BT.long().cumsum(1) - 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a micro-batch is to be run: unroll steps, target rows per chunk of the loss, and where."""

    steps: int
    chunk_rows: int
    device: torch.device


def build_batch(features: Sequence[Features], loss_masks: Sequence[Tensor], plan: Plan) -> Batch:
    """One row per sample. A sample too short to predict anything has no supervised pair."""
    states = {feature.norm_state for feature in features}
    assert len(states) == 1, f"one engine writes one norm state, got {states}"
    rows = Rows.one_document_each([f.input_ids_T.cpu() for f in features], [mask_T.cpu() for mask_T in loss_masks])
    taps_BTF = pad_sequence([f.taps_TNH.to(plan.device).flatten(1) for f in features], batch_first=True)
    last_BTH = pad_sequence([f.last_TH.to(plan.device) for f in features], batch_first=True)
    return assemble(rows, taps_BTF, last_BTH, features[0].norm_state, plan)


def assemble(rows: Rows, taps_BTF: Tensor, last_BTH: Tensor, norm_state: NormState, plan: Plan) -> Batch:
    """Plan rows of any documents on the CPU, where `rows` are, and move the plan to the features' device."""
    supervised_BTK = rows.supervised_BTK(plan.steps)
    slots_BQ, rank_BT = running_slots(supervised_BTK)
    starts_BT = rows.starts_BT
    pairs = Pairs.of(supervised_BTK, rank_BT, slots_BQ.shape[1], rows.document_BT)
    device = plan.device
    inputs = UnrollInputs(
        tokens_BT=rows.input_ids_BT.to(device),
        taps_BTF=taps_BTF,
        position_BT=(torch.arange(starts_BT.shape[1]) - starts_BT).to(device),
        slots_BQ=slots_BQ.to(device),
        mask=MaskSpec.limits(starts_BT.gather(1, slots_BQ).to(device), (slots_BQ + 1).to(device)),
    )
    return Batch(
        rows=_moved(rows, device),
        inputs=inputs,
        pairs=_moved(pairs, device),
        chunks=plan_chunks(pairs.row_M, pairs.sizes, pairs.position_R.numel(), plan.chunk_rows),
        last_RH=last_BTH.flatten(0, 1)[pairs.position_R.to(device)],
        norm_state=norm_state,
        documents=int(rows.document_BT.max()) + 1,
    )


def _moved(planned: Planned, device: torch.device) -> Planned:
    """Every tensor of it on `device`."""
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(planned).items() if isinstance(value, Tensor)
    }
    return replace(planned, **moved)
