"""From an algorithm's options to what a micro-batch's pairs are taught: what all algorithms have in common.

Shape letters: M supervised (slot, step) pairs grouped by step, R target rows, H target hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchspec.core.algorithms.taught import TaughtBatch
from torchspec.core.interfaces.algorithm import Moment, StepMemory, StepResult
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.distillation import PairTerms, Supervision
from torchspec.core.objectives.teachers import teacher_of
from torchspec.core.objectives.terms import ObjectiveOptions, term_weights
from torchspec.core.objectives.weighting import per_sequence, step_weights


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a micro-batch's pairs are taught.

    sequences   over how many sequences the loss is a mean; None: over pairs
    counts      the loss is divided by the number of pairs instead of their weights
    """

    supervision: Supervision
    moment: Moment
    sequences: Tensor | None = None
    counts: bool = False

    def denominator(self, terms: PairTerms) -> Tensor:
        if self.sequences is not None:
            return self.sequences
        return terms.coverage_M.sum() if self.counts else (self.supervision.base_M * terms.coverage_M).sum()


def lesson_of(
    options: ObjectiveOptions,
    batch: TaughtBatch,
    head: TargetHead,
    vocabulary: VocabularyMap,
    device: Device,
    memory: StepMemory,
    moment: Moment,
    *,
    decay: float,
    truth: bool = False,
    counts: bool = False,
) -> Lesson:
    """`decay` ** k weighs step k; with `truth` the tokens of the text are given whatever the terms are. A collective
    where ranks share the target's head, or a sequence whose mean is asked for."""
    pairs = batch.pairs
    teacher = teacher_of(
        head,
        head.normed(batch.last_RH, batch.norm_state),
        vocabulary,
        device.ops,
        coverage=options.coverage,
        with_logs=options.with_logs,
        shard_logits=memory.shard_logits,
    )
    placed: Any = {"dtype": teacher.wide, "device": pairs.row_M.device}
    base_M, sequences = step_weights(pairs.sizes, decay, **placed), None
    if options.normalisation == "per_sequence":
        coverage_M = teacher.survey(batch.chunks)[pairs.row_M]
        base_M, sequences = per_sequence(base_M, coverage_M, pairs.document_M, batch.documents, batch.sequence)
    supervision = Supervision(
        teacher=teacher,
        chunks=batch.chunks,
        slot_M=pairs.slot_M,
        row_M=pairs.row_M,
        base_M=base_M,
        weights=term_weights(options, moment, pairs.sizes, **placed),
        truth_M=batch.truth(vocabulary) if truth or "ground_truth" in options.objective else None,
    )
    return Lesson(supervision=supervision, moment=moment, sequences=sequences, counts=counts)


def result_of(numerator: Tensor, sums: dict[str, Tensor]) -> StepResult:
    """Of a pass whose sums hold `loss_denominator`."""
    sums = sums | {"loss_numerator": numerator.detach()}
    return StepResult(numerator=numerator, denominator=sums["loss_denominator"], sums=sums)
