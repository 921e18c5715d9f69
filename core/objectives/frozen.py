"""The rows of a target's output head that a draft without a head of its own is multiplied by.

Shape letters: N draft vocabulary (or this rank's part of it), H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import ShardLogits
from torchspec.core.objectives.reading import columns


class FrozenHead:
    """Copies are made once: of a pruned vocabulary, of another precision, or read back where ranks share the head."""

    def __init__(self) -> None:
        self._made: tuple[TargetHead, Tensor, torch.dtype, ShardLogits, Tensor] | None = None

    def rows(
        self, head: TargetHead, vocabulary: VocabularyMap, dtype: torch.dtype, shard_logits: ShardLogits
    ) -> tuple[Tensor, bool]:
        """(the rows [N, H], whether they are this rank's part alone: see `distillation.Head`)."""
        is_part = head.shards is not None and shard_logits == "vocabulary"
        made = self._made
        if made is None or made[0] is not head or made[1] is not vocabulary.ids_N or made[2:4] != (dtype, shard_logits):
            rows_NH = self._read(head, vocabulary, is_part).to(dtype)
            made = self._made = (head, vocabulary.ids_N, dtype, shard_logits, rows_NH)
        return made[4], is_part

    def _read(self, head: TargetHead, vocabulary: VocabularyMap, is_part: bool) -> Tensor:
        whole = vocabulary.size == vocabulary.target_size
        if head.shards is None:
            return head.head_VH if whole else head.rows(vocabulary.ids_N)
        if not is_part:
            return head.rows(vocabulary.ids_N)
        start, stop = head.shards.bounds(head.shards.rank)
        if whole:
            return head.shard_VH
        return head.shard_VH[vocabulary.ids_N[columns(vocabulary, start, stop)] - start]
