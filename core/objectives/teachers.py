"""Which teacher reads a target's head: alone, or with the ranks that share it."""

from __future__ import annotations

from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import ShardLogits
from torchspec.core.objectives.teacher import Coverage, Teacher
from torchspec.core.objectives.token_teacher import TokenTeacher
from torchspec.core.objectives.vocabulary_teacher import VocabularyTeacher


def teacher_of(
    head: TargetHead,
    normed_RH: Tensor,
    vocabulary: VocabularyMap,
    ops: FusedOps,
    *,
    coverage: Coverage = "drop",
    with_logs: bool = False,
    shard_logits: ShardLogits = "tokens",
) -> Teacher | VocabularyTeacher:
    """Of this rank's rows; `shard_logits` matters where ranks share the head, whose chunks are then
    `plan_shared_chunks`'s."""
    if head.shards is None:
        return Teacher(head, normed_RH, vocabulary, ops, coverage=coverage, with_logs=with_logs)
    shared = TokenTeacher if shard_logits == "tokens" else VocabularyTeacher
    return shared(head, normed_RH, vocabulary, ops, coverage=coverage, with_logs=with_logs)
