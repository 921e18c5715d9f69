"""P-EAGLE for the trainer: builds the draft, runs a micro-batch, sums the metrics, hands out drafters.

Shape letters: B rows, T positions, K depths, M supervised (slot, depth) elements, R target rows, H draft hidden size,
N draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from torchspec.core.algorithms.base import DraftAlgorithm
from torchspec.core.algorithms.eagle3.batch import halo
from torchspec.core.algorithms.lesson import lesson_of, result_of
from torchspec.core.algorithms.peagle import serving
from torchspec.core.algorithms.peagle.batch import Batch, Plan, build_batch
from torchspec.core.algorithms.peagle.drafter import PEagleDrafter
from torchspec.core.algorithms.peagle.geometry import PEagleGeometry, derive
from torchspec.core.algorithms.peagle.initialise import initialise
from torchspec.core.algorithms.peagle.metrics import element_sums
from torchspec.core.algorithms.peagle.model import PEagleDraft
from torchspec.core.algorithms.peagle.options import PEagleOptions
from torchspec.core.algorithms.peagle.sampling import DepthSampling
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
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.distillation import Head, distil


@dataclass(frozen=True, kw_only=True)
class PEagle(DraftAlgorithm[Plan, Batch]):
    """The algorithm for one target. `geometry` fixes the draft; `create` derives it."""

    options: PEagleOptions
    geometry: PEagleGeometry
    name: str = "peagle"

    @classmethod
    def create(cls, options: PEagleOptions, target: TargetSpec) -> PEagle:
        """Raises ConfigError with everything about the options that does not fit the target."""
        geometry, taps = derive(options, target)
        return cls(options=options, target=target, geometry=geometry, taps=taps)

    @property
    def layouts(self) -> tuple[str, ...]:
        from torchspec.core.algorithms.peagle import convert

        return convert.LAYOUTS

    @property
    def sampling(self) -> DepthSampling:
        options = self.options
        return DepthSampling(depths=options.depths, ratio=options.depth_ratio, least=options.depth_ratio_min)

    @property
    def attention_shape(self) -> AttentionShape:
        """See `Algorithm.attention_shape`; in every layer the depths meet depth 0's keys, ever fewer elements."""
        geometry, depths = self.geometry, self.options.depths
        return AttentionShape(
            query_heads=geometry.num_attention_heads,
            key_heads=geometry.num_key_value_heads,
            head_size=geometry.head_dim,
            steps=depths,
            layers=geometry.num_layers,
            slots=sum(self.sampling.share(depth) for depth in range(depths)) / depths,
        )

    @property
    def loss_steps(self) -> int:
        """See `Algorithm.loss_steps`."""
        return self.options.depths

    @property
    def halo(self) -> int:
        """See `Algorithm.halo`; the last depth looks as far ahead as EAGLE-3's last step."""
        return halo(self.options.depths)

    @property
    def decay(self) -> float:
        return self.options.depth_decay

    def kept_values(
        self, *, recompute: bool, moment: Literal["loss", "backward"] = "backward", text: int | None = None
    ) -> float:
        """Per token: the embedding and fc's output. Per element and layer: q, k, v, the attention's output, the
        residual, gate, up and the output; of layers that are made again k, v and the output alone. In the first layer
        the v of elements beyond depth 0 is one for all. The last outputs have a gradient each, which is scaled in a
        copy in the backward pass, when the outputs are gone.

        That goes from the last layer's last depth to its first. At each there are the gradients of gate, up and their
        product, those of the keys and values of the depths before, twice as they are added up, and no longer what the
        depths behind it kept."""
        geometry, layers = self.geometry, self.geometry.num_layers
        size, heads = geometry.hidden_size, geometry.head_dim * geometry.num_attention_heads
        keys_values = 2 * geometry.head_dim * geometry.num_key_value_heads
        shares = [self.sampling.share(depth) for depth in range(self.options.depths)]
        elements = sum(shares)
        made = 2 * heads + size + 2 * geometry.intermediate_size
        kept = 2 * size + elements * (layers * (size + keys_values) + size) - (elements - 1) * keys_values / 2
        if not recompute:
            kept += layers * elements * made
        if moment == "loss":
            return kept
        passing = [0.0]
        for depth, share in enumerate(shares):
            behind = sum(shares[depth + 1 :])
            again = made * share if recompute else -made * behind
            keys = keys_values * (sum(shares[: depth + 1]) + depth * share)
            passing.append(3 * geometry.intermediate_size * share + keys + again - size * (elements + behind))
        return kept + max(passing)

    def build_draft(self, vocabulary: VocabularyMap, head: TargetHead) -> PEagleDraft:
        """A fresh float32 draft on the CPU. Raises ConfigError for a vocabulary map of other sizes."""
        self.check_vocabulary(vocabulary)
        draft = PEagleDraft(self.geometry, vocabulary)
        initialise(draft, head)
        return draft

    def plan(self, head: TargetHead, loss_bytes: int, memory: StepMemory = KEEP_ALL) -> Plan:
        return Plan(sampling=self.sampling, **self.taught_by(head, loss_bytes, memory))

    def assemble(self, rows: FeatureRows, plan: Plan, moment: Moment) -> Batch:
        return build_batch(rows, plan, moment)

    def run(
        self,
        draft: nn.Module,
        head: TargetHead,
        batch: Batch,
        device: Device,
        memory: StepMemory = KEEP_ALL,
        moment: Moment = START,
    ) -> StepResult:
        vocabulary = vocabulary_of(draft)
        lesson = lesson_of(self.options, batch, head, vocabulary, device, memory, moment, decay=self.decay)

        def objective(outputs: list[Tensor], output_head: Head) -> tuple[Tensor, dict[str, Tensor]]:
            numerator, terms = distil(outputs, output_head, lesson.supervision, device.ops)
            return numerator, element_sums(batch, terms) | {"loss_denominator": lesson.denominator(terms)}

        numerator, sums = draft(batch.inputs, head.embedding_VH, device, objective, recompute=memory.recompute)
        return result_of(numerator, sums)

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float | list[float]]:
        """See `algorithms.metrics.summarise`; the walk is over texts that kept every element: at a depth_ratio of 1
        all."""
        return super().summarise(sums)

    def drafter(self, draft: nn.Module, head: TargetHead, device: Device) -> PEagleDrafter:
        """Drafts with the parameters `draft` holds now, in their precision; `draft` must not be sharded."""
        assert isinstance(draft, PEagleDraft)
        return PEagleDrafter(draft, head, device, self.taps)

    def to_files(self, draft_state: dict[str, Tensor], layout: str) -> DraftFiles:
        from torchspec.core.algorithms.peagle import convert

        return convert.to_files(self, draft_state, layout)

    def serve(
        self, files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor
    ) -> Tensor:
        self.check_served_taps(serving.served_taps(files.config, self.target.num_layers))
        return serving.serve(files, head, taps_TNH, next_tokens_T, drafted_L)
