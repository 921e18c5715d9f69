"""EAGLE-3 for the trainer: builds the draft, runs a micro-batch, sums the metrics, hands out drafters.

Shape letters: B rows, T positions, K unroll steps, M supervised (slot, step) pairs, R target rows, H draft hidden
size, N draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from torchspec.core.algorithms.base import DraftAlgorithm
from torchspec.core.algorithms.eagle3 import serving
from torchspec.core.algorithms.eagle3.batch import Batch, Plan, build_batch, halo
from torchspec.core.algorithms.eagle3.derive import derive
from torchspec.core.algorithms.eagle3.drafter import Eagle3Drafter
from torchspec.core.algorithms.eagle3.geometry import Geometry
from torchspec.core.algorithms.eagle3.initialise import initialise
from torchspec.core.algorithms.eagle3.metrics import pair_sums
from torchspec.core.algorithms.eagle3.model import Eagle3Draft
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.algorithms.lesson import lesson_of, result_of
from torchspec.core.algorithms.vocabulary import vocabulary_of
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import (
    KEEP_ALL,
    START,
    AttentionShape,
    DraftFiles,
    Moment,
    StepMemory,
    StepResult,
)
from torchspec.core.interfaces.device import Device, FusedOps
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.distillation import Head, PairTerms, Supervision, distil


@dataclass(frozen=True, kw_only=True)
class Eagle3(DraftAlgorithm[Plan, Batch]):
    """The algorithm for one target. `geometry` fixes the draft; `create` derives it."""

    options: Eagle3Options
    geometry: Geometry
    name: str = "eagle3"

    @classmethod
    def create(cls, options: Eagle3Options, target: TargetSpec) -> Eagle3:
        """Raises ConfigError with everything about the options that does not fit the target."""
        geometry, taps = derive(options, target)
        return cls(options=options, target=target, geometry=geometry, taps=taps)

    @property
    def layouts(self) -> tuple[str, ...]:
        from torchspec.core.algorithms.eagle3 import convert

        return convert.layouts(self.geometry, self.taps)

    def kept_values(
        self, *, recompute: bool, moment: Literal["loss", "backward"] = "backward", text: int | None = None
    ) -> float:
        """Once: the embedding and fc's output. Per step: output, its gradient, k and v; of all but the last also the
        normed output, where that is fed back. Of each step: q, the output of the attention, the residual, gate and up.
        Made again, these are there once and in the backward pass only, and the embedding's share of q, k, v stays. In
        the backward pass the outputs' gradients are scaled in a copy; later come gate, up and their product again as
        gradients, and those of all steps' k and v, when the last step's output and what stood beside it are gone (live
        bytes were counted: within 2 % from thousands of rows on).

        Latent attention keeps `AttentionValues` beside, and has keys of so many heads that what passes through
        attention's backward is most: in the last step, or, where the rest is made again, in the one before, whose
        gradients of k and v are there beside the last one's (counted so, too: within 5 %)."""
        geometry, steps = self.geometry, self.options.unroll
        size, heads = geometry.hidden_size, geometry.head_dim * geometry.num_attention_heads
        keys_values, more = 2 * geometry.head_dim * geometry.num_key_value_heads, geometry.attention_values
        layer = size + 2 * heads + 2 * geometry.intermediate_size + more.queries + more.keys
        kept = 2 * size + steps * (2 * size + keys_values) + (more.parts + more.keys if recompute else steps * layer)
        kept += (steps - 1) * size if geometry.norm_output else 0
        if moment == "loss":
            return kept
        gradients = 3 * geometry.intermediate_size - size
        through = more.gradients - 2 * size
        if recompute:
            gradients += 2 * (geometry.intermediate_size + heads) + steps * keys_values - size // 2
            through += (2 * steps - 3) * keys_values + 3 * heads + more.queries + more.keys
        else:
            through += steps * keys_values + 2 * heads - 2 * geometry.intermediate_size
        return kept + max(steps * size, gradients, through)

    def build_draft(self, vocabulary: VocabularyMap, head: TargetHead) -> Eagle3Draft:
        """A fresh float32 draft on the CPU. Raises ConfigError for a vocabulary map of other sizes."""
        self.check_vocabulary(vocabulary)
        draft = Eagle3Draft(self.geometry, vocabulary)
        initialise(draft, head)
        return draft

    @property
    def attention_shape(self) -> AttentionShape:
        """See `Algorithm.attention_shape`."""
        geometry = self.geometry
        return AttentionShape(
            query_heads=geometry.num_attention_heads,
            key_heads=geometry.num_key_value_heads,
            head_size=geometry.head_dim,
            steps=self.loss_steps,
        )

    @property
    def loss_steps(self) -> int:
        """See `Algorithm.loss_steps`."""
        return self.options.unroll

    @property
    def halo(self) -> int:
        """See `Algorithm.halo`."""
        return halo(self.options.unroll)

    @property
    def decay(self) -> float:
        return self.options.step_decay

    def plan(self, head: TargetHead, loss_bytes: int, memory: StepMemory = KEEP_ALL) -> Plan:
        return Plan(steps=self.options.unroll, **self.taught_by(head, loss_bytes, memory))

    def assemble(self, rows: FeatureRows, plan: Plan, moment: Moment) -> Batch:
        return build_batch(rows, plan)

    def run(
        self,
        draft: nn.Module,
        head: TargetHead,
        batch: Batch,
        device: Device,
        memory: StepMemory = KEEP_ALL,
        moment: Moment = START,
    ) -> StepResult:
        options, vocabulary = self.options, vocabulary_of(draft)
        lesson = lesson_of(options, batch, head, vocabulary, device, memory, moment, decay=self.decay)

        def objective(outputs: list[Tensor], output_head: Head) -> tuple[Tensor, dict[str, Tensor]]:
            numerator, terms = self.teach(outputs, output_head, lesson.supervision, device.ops)
            return numerator, pair_sums(batch, terms) | {"loss_denominator": lesson.denominator(terms)}

        numerator, sums = draft(
            batch.inputs, head.embedding_VH, options.unroll, device, objective, recompute=memory.recompute
        )
        return result_of(numerator, sums)

    def teach(
        self, outputs: list[Tensor], head: Head, supervision: Supervision, ops: FusedOps
    ) -> tuple[Tensor, PairTerms]:
        """The loss of all steps; the place for another one (docs/add-an-algorithm.md, `objectives.own.distil_by`)."""
        return distil(outputs, head, supervision, ops)

    def drafter(self, draft: nn.Module, head: TargetHead, device: Device) -> Eagle3Drafter:
        """Drafts with the parameters `draft` holds now, in their precision; `draft` must not be sharded."""
        assert isinstance(draft, Eagle3Draft)
        return Eagle3Drafter(draft, head, device, self.taps)

    def to_files(self, draft_state: dict[str, Tensor], layout: str) -> DraftFiles:
        from torchspec.core.algorithms.eagle3 import convert

        return convert.to_files(self, draft_state, layout)

    def serve(
        self, files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor
    ) -> Tensor:
        self.check_served_taps(serving.served_taps(files.config, self.target.num_layers))
        return serving.serve(files, head, taps_TNH, next_tokens_T, drafted_L)
