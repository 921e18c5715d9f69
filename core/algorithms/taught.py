"""What all micro-batches hold for their loss: the supervised pairs, the rows that teach them, and the chunks.

A cell is what drafts K tokens: a slot of an unroll, or a block. Its step k is taught by the target's last hidden state
k rows behind the one that teaches its step 0.

Shape letters: B rows, C cells of a row that this rank owns, K steps, M supervised pairs (grouped by step, then by row
and cell), X last hidden states of a row, halos included, R target rows (positions that teach at least one pair), H
target hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.core.features.rows import FeatureRows, TokenRows
from torchspec.core.interfaces.features import NormState
from torchspec.core.interfaces.target import VocabularyMap, VocabularyShards
from torchspec.core.objectives.chunks import Chunk, plan_chunks, plan_shared_chunks
from torchspec.core.objectives.teacher import OUTSIDE
from torchspec.core.ops.transfer import fields_to_device, to_device
from torchspec.core.parallel.sequence import SequenceGroup


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The supervised (cell, step) pairs of this rank and the target rows that teach them.

    slot_M      index of the pair's output into the flattened outputs of its step
    cell_M      index of the pair into the flattened [B, C, K]
    row_M       its target row; ascending within a step
    document_M  its document
    token_M     the token that it predicts
    place_R     index of each target row into the flattened last hidden states; ascending
    size_K      pairs of each step; they sum to M
    sizes       the same on the host
    """

    slot_M: Tensor
    cell_M: Tensor
    row_M: Tensor
    document_M: Tensor
    token_M: Tensor
    place_R: Tensor
    size_K: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        supervised_BCK: Tensor,
        predicted_BCK: Tensor,
        document_BC: Tensor,
        teacher_BC: Tensor,
        last_rows: int,
        slot: Callable[[Tensor, Tensor, int], Tensor],
    ) -> Pairs:
        """`teacher_BC` is the row, of X = `last_rows`, that teaches a cell's step 0; `slot(b, c, step)` gives slot_M of
        the pairs of a step, by their rows and cells."""
        rows, cells, steps = supervised_BCK.shape
        found = [supervised_BCK[:, :, step].nonzero(as_tuple=True) for step in range(steps)]
        place_M = torch.cat([b * last_rows + teacher_BC[b, c] + step for step, (b, c) in enumerate(found)])
        teaches = torch.zeros(rows * last_rows, dtype=torch.bool)
        teaches[place_M] = True
        sizes = tuple(b.numel() for b, _ in found)
        return cls(
            slot_M=torch.cat([slot(b, c, step) for step, (b, c) in enumerate(found)]),
            cell_M=torch.cat([(b * cells + c) * steps + step for step, (b, c) in enumerate(found)]),
            row_M=(teaches.long().cumsum(0) - 1)[place_M],
            document_M=torch.cat([document_BC[b, c] for b, c in found]),
            token_M=torch.cat([predicted_BCK[b, c, step] for step, (b, c) in enumerate(found)]),
            place_R=teaches.nonzero()[:, 0],
            size_K=torch.tensor(sizes),
            sizes=sizes,
        )


@dataclass(frozen=True, kw_only=True)
class TaughtBatch:
    """One micro-batch on the device, as far as all algorithms' are alike. `last_RH` are the target's last hidden states
    at the teaching positions."""

    tokens: TokenRows
    pairs: Pairs
    chunks: tuple[Chunk, ...]
    last_RH: Tensor
    norm_state: NormState
    documents: int
    sequence: SequenceGroup | None

    def truth(self, vocabulary: VocabularyMap) -> Tensor:
        """Draft index of the token that each pair predicts, [M]; OUTSIDE if the draft cannot say it."""
        token_M = self.pairs.token_M
        place_M = torch.searchsorted(vocabulary.ids_N, token_M).clamp_max(vocabulary.size - 1)
        return torch.where(vocabulary.ids_N[place_M] == token_M, place_M, OUTSIDE)


@dataclass(frozen=True, kw_only=True)
class TaughtPlan:
    """Target rows per chunk of the loss, where micro-batches go, and whether ranks share the target's head and so the
    chunks."""

    chunk_rows: int
    device: torch.device
    shards: VocabularyShards | None = None

    def taught(self, rows: FeatureRows, pairs: Pairs) -> dict[str, Any]:
        """The fields of a `TaughtBatch`, of pairs on the host; a collective over those who share the head."""
        cut = (pairs.row_M, pairs.sizes, pairs.place_R.numel(), self.chunk_rows)
        return {
            "tokens": fields_to_device(rows.tokens, self.device),
            "pairs": fields_to_device(pairs, self.device),
            "chunks": plan_chunks(*cut) if self.shards is None else plan_shared_chunks(*cut, self.shards),
            "last_RH": to_device(rows.last_BXH, self.device).flatten(0, 1)[to_device(pairs.place_R, self.device)],
            "norm_state": rows.norm_state,
            "documents": int(rows.tokens.document_BT.max()) + 1,
            "sequence": rows.sequence,
        }
