"""What the algorithms that ship have in common. One from elsewhere may derive from it, and need not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from torchspec.core.algorithms.metrics import summarise
from torchspec.core.algorithms.taught import TaughtBatch, TaughtPlan
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import KEEP_ALL, START, Moment, StepMemory, StepResult
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.chunks import LossShape, chunk_rows
from torchspec.core.objectives.terms import ObjectiveOptions

Plan = TypeVar("Plan", bound=TaughtPlan)
Batch = TypeVar("Batch", bound=TaughtBatch)


@dataclass(frozen=True, kw_only=True)
class DraftAlgorithm(ABC, Generic[Plan, Batch]):
    """An `Algorithm` for one target. `geometry` fixes the draft; it states `hidden_size`, `vocab_size` and, unless
    `vocabulary_size` is given, `draft_vocab_size`."""

    options: ObjectiveOptions
    target: TargetSpec
    geometry: Any
    taps: tuple[int, ...]

    @property
    @abstractmethod
    def loss_steps(self) -> int:
        """See `Algorithm.loss_steps`."""

    @property
    @abstractmethod
    def decay(self) -> float:
        """Weight of a step over that of the step before."""

    @abstractmethod
    def plan(self, head: TargetHead, loss_bytes: int, memory: StepMemory = KEEP_ALL) -> Plan:
        """How micro-batches are cut so that a chunk of the loss fits `loss_bytes`."""

    @abstractmethod
    def assemble(self, rows: FeatureRows, plan: Plan, moment: Moment) -> Batch:
        """Plan this rank's rows on the CPU and move the plan and the features to the device."""

    @abstractmethod
    def run(
        self,
        draft: nn.Module,
        head: TargetHead,
        batch: Batch,
        device: Device,
        memory: StepMemory = KEEP_ALL,
        moment: Moment = START,
    ) -> StepResult:
        """The training forward of an assembled micro-batch."""

    @property
    def vocabulary_size(self) -> int:
        """See `Algorithm.vocabulary_size`."""
        size: int = self.geometry.draft_vocab_size
        return size

    @property
    def remembers(self) -> tuple[str, ...]:
        """See `Algorithm.remembers`."""
        return self.options.remembers

    def step(
        self,
        draft: nn.Module,
        head: TargetHead,
        rows: FeatureRows,
        device: Device,
        memory: StepMemory = KEEP_ALL,
        moment: Moment = START,
    ) -> StepResult:
        """The training forward of one micro-batch; see `Algorithm.step`."""
        plan = self.plan(head, memory.loss_bytes or device.ops.loss_bytes, memory)
        return self.run(draft, head, self.assemble(rows, plan, moment), device, memory, moment)

    def taught_by(self, head: TargetHead, loss_bytes: int, memory: StepMemory) -> dict[str, Any]:
        """The fields of a `TaughtPlan`, such that a chunk of the loss fits `loss_bytes`."""
        shape = LossShape(
            steps=self.loss_steps,
            hidden=self.geometry.hidden_size,
            draft_vocabulary=self.vocabulary_size,
            target_vocabulary=self.geometry.vocab_size,
            itemsize=head.shard_VH.itemsize,
            with_logs=self.options.with_logs,
            ranks=1 if head.shards is None else head.shards.size,
            shard_logits=memory.shard_logits,
        )
        return {
            "chunk_rows": chunk_rows(shape, loss_bytes),
            "device": head.embedding_VH.device,
            "shards": head.shards,
        }

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float | list[float]]:
        """See `algorithms.metrics.summarise`."""
        return summarise(sums, self.decay)

    def vocabulary_problems(self, vocabulary: VocabularyMap) -> list[Problem]:
        """Where the map is not one for this draft."""
        wanted = (self.vocabulary_size, self.geometry.vocab_size)
        if (vocabulary.size, vocabulary.target_size) == wanted:
            return []
        return [
            Problem(
                field="draft.vocab_size",
                value=wanted[0],
                message=f"the vocabulary map holds {vocabulary.size} of {vocabulary.target_size} tokens, "
                f"the draft is to have {wanted[0]} of {wanted[1]}",
                remedy="use the map that belongs to this draft and target",
            )
        ]

    def check_vocabulary(self, vocabulary: VocabularyMap) -> None:
        """Raises ConfigError for a map of other sizes."""
        if problems := self.vocabulary_problems(vocabulary):
            raise ConfigError(problems)

    def check_served_taps(self, served: tuple[int, ...]) -> None:
        """Raises CheckpointError where an engine, which would tap `served`, taps other layers than `taps`."""
        if served != self.taps:
            raise CheckpointError(
                f"an engine that reads the exported config.json taps the layers {list(served)}, but the draft was "
                f"trained on {list(self.taps)}: its tap ids are wrong"
            )
