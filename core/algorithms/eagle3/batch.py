"""A micro-batch of the EAGLE-3 unroll: which slots run, what they read, and which (slot, step) pairs are supervised.

Slot i holds the taps of position i and token x_{i+1}; its step k reads token x_{i+1+k} and predicts x_{i+2+k}, whose
distribution the target gives at position i+1+k. The mask belongs to the *predicted* token (docs/concepts.md).

Shape letters: B rows, T positions of the longest row, Q running slots per row, K unroll steps, M supervised pairs
(grouped by step, then by row and slot), X = T + K, R target rows (positions that teach at least one pair), F = taps x
target hidden size, H target hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from torchspec.core.interfaces.features import Features, NormState
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.objectives.chunks import Chunk, plan_chunks
from torchspec.core.objectives.teacher import OUTSIDE

Planned = TypeVar("Planned", "Rows", "Pairs", "Slots", "UnrollInputs")

PADDING = -1
"""The document of positions behind a row's end."""

DENSE = 0.9
"""Share of running slots above which all of them run."""


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
    size_K      pairs of each step; they sum to M
    sizes       the same on the host
    """

    slot_M: Tensor
    cell_M: Tensor
    row_M: Tensor
    document_M: Tensor
    position_R: Tensor
    size_K: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, supervised_BTK: Tensor, rank_BT: Tensor, queries: int, document_BT: Tensor) -> Pairs:
        rows, length, steps = supervised_BTK.shape
        # A pair (i, k) shares its target position i + 1 + k with (i + k, 0), which is then supervised as well.
        first_BT = supervised_BTK[:, :, 0]
        row_BT = (first_BT.flatten().long().cumsum(0) - 1).view(rows, length)
        found = [supervised_BTK[:, :, step].nonzero(as_tuple=True) for step in range(steps)]
        row_B, slot_B = first_BT.nonzero(as_tuple=True)
        sizes = tuple(b.numel() for b, _ in found)
        return cls(
            slot_M=torch.cat([b * queries + rank_BT[b, i] for b, i in found]),
            cell_M=torch.cat([(b * length + i) * steps + step for step, (b, i) in enumerate(found)]),
            row_M=torch.cat([row_BT[b, i + step] for step, (b, i) in enumerate(found)]),
            document_M=torch.cat([document_BT[b, i] for b, i in found]),
            position_R=row_B * length + slot_B + 1,
            size_K=torch.tensor(sizes),
            sizes=sizes,
        )


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The slots that run the unroll, index_BQ; rows with fewer repeat their last one, unsupervised.

    whole    they are all T positions in order, so that rows are views instead of copies
    """

    index_BQ: Tensor
    whole: bool

    def take(self, x_BXZ: Tensor, ahead: int = 0) -> Tensor:
        """The rows `ahead` of each slot, [B, Q, Z]; x has at least T + `ahead` of them."""
        if self.whole:
            return x_BXZ[:, ahead : ahead + self.index_BQ.shape[1]]
        batch, rows = x_BXZ.shape[:2]
        first_B = torch.arange(ahead, ahead + batch * rows, rows, device=x_BXZ.device)
        flat_Q = (self.index_BQ + first_B[:, None]).flatten()
        return x_BXZ.flatten(0, 1).index_select(0, flat_Q).view(*self.index_BQ.shape, -1)


@dataclass(frozen=True, kw_only=True)
class UnrollInputs:
    """What the draft reads, on the device.

    tokens_BX     the following tokens: position i's is tokens_BX[:, i + 1]; K stand-ins stand behind the last one
    taps_BTF      the target's taps, concatenated in tap order
    position_BT   rotary positions, restarting with each document
    own_BQ        those of the running slots
    angles        one more than the largest rotary position of any step
    mask          which step-0 keys each running slot sees; its limits are on the host, where attention is planned
    """

    tokens_BX: Tensor
    taps_BTF: Tensor
    position_BT: Tensor
    own_BQ: Tensor
    angles: int
    slots: Slots
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

    def truth(self, vocabulary: VocabularyMap) -> Tensor:
        """Draft index of the token that each pair predicts, [M]; OUTSIDE if the draft cannot say it."""
        token_M = self.rows.input_ids_BT.flatten()[self.pairs.position_R[self.pairs.row_M] + 1]
        place_M = torch.searchsorted(vocabulary.ids_N, token_M).clamp_max(vocabulary.size - 1)
        return torch.where(vocabulary.ids_N[place_M] == token_M, place_M, OUTSIDE)


def running_slots(supervised_BTK: Tensor) -> tuple[Slots, Tensor]:
    """The slots with any supervised step, packed to the left (Q >= 1), and each slot's rank_BT among them.

    Only step-0 keys of the others are ever looked at, so nothing else of them is computed. Where few would be left
    out all run: copying rows to and fro costs more.
    """
    runs_BT = supervised_BTK.any(-1)
    place_BT = torch.arange(runs_BT.shape[1]).expand_as(runs_BT)
    if int(runs_BT.sum()) >= DENSE * runs_BT.numel():
        return Slots(index_BQ=place_BT, whole=True), place_BT
    count_B = runs_BT.sum(-1)
    queries = max(1, int(count_B.max()))
    order_BT = torch.argsort(~runs_BT, dim=1, stable=True)
    last_B = (count_B - 1).clamp_min(0)
    slots_BQ = order_BT.gather(1, torch.minimum(torch.arange(queries)[None], last_B[:, None]))
    return Slots(index_BQ=slots_BQ, whole=False), runs_BT.long().cumsum(1) - 1


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
    taps_BTF = _padded([f.taps_TNH.to(plan.device, non_blocking=True).flatten(1) for f in features])
    last_BTH = _padded([f.last_TH.to(plan.device, non_blocking=True) for f in features])
    return assemble(rows, taps_BTF, last_BTH, features[0].norm_state, plan)


def assemble(rows: Rows, taps_BTF: Tensor, last_BTH: Tensor, norm_state: NormState, plan: Plan) -> Batch:
    """Plan rows of any documents on the CPU, where `rows` are, and move the plan to the features' device."""
    supervised_BTK = rows.supervised_BTK(plan.steps)
    slots, rank_BT = running_slots(supervised_BTK)
    starts_BT = rows.starts_BT
    index_BQ = slots.index_BQ
    pairs = Pairs.of(supervised_BTK, rank_BT, index_BQ.shape[1], rows.document_BT)
    position_BT = torch.arange(starts_BT.shape[1]) - starts_BT
    inputs = UnrollInputs(
        tokens_BX=F.pad(rows.input_ids_BT, (0, plan.steps)),
        taps_BTF=taps_BTF,
        position_BT=position_BT,
        own_BQ=position_BT.gather(1, index_BQ),
        angles=int(position_BT.max()) + plan.steps,
        slots=_moved(slots, plan.device),
        mask=_mask(starts_BT, slots, rows),
    )
    return Batch(
        rows=_moved(rows, plan.device),
        inputs=_moved(inputs, plan.device),
        pairs=_moved(pairs, plan.device),
        chunks=plan_chunks(pairs.row_M, pairs.sizes, pairs.position_R.numel(), plan.chunk_rows),
        last_RH=last_BTH.flatten(0, 1)[pairs.position_R.to(plan.device, non_blocking=True)],
        norm_state=norm_state,
        documents=int(rows.document_BT.max()) + 1,
    )


def _mask(starts_BT: Tensor, slots: Slots, rows: Rows) -> MaskSpec:
    """Causal within the slot's document; the plain form where each row is one document and all its slots run."""
    first_BT = rows.document_BT[:, :1]
    if slots.whole and bool(((rows.document_BT == first_BT) | (rows.document_BT == PADDING)).all()):
        return MaskSpec.causal()
    return MaskSpec.limits(starts_BT.gather(1, slots.index_BQ), slots.index_BQ + 1)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """[B, T of the longest, ...]; a single row is not copied."""
    return rows[0][None] if len(rows) == 1 else pad_sequence(list(rows), batch_first=True)


def _moved(planned: Planned, device: torch.device) -> Planned:
    """Every tensor of it on `device`; the host does not wait for the copies."""
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=True) for name, value in vars(planned).items() if isinstance(value, Tensor)
    }
    return replace(planned, **moved)
