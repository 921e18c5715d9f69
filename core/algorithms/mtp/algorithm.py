"""Fine-tuning of multi-token-prediction heads for the trainer: builds the draft, runs a micro-batch, sums the metrics,
hands out drafters.

Slots, their supervision and their metrics are those of EAGLE-3's unroll (`eagle3.batch`): slot i's step k reads token
x_{i+1+k} and predicts x_{i+2+k}. The loss is sum_k beta^k L_k over sum_k beta^k n_k, so that FastMTP's weights
beta^k / sum_j beta^j (2509.18362, eq. 2) need no normalisation of their own.

Shape letters: B rows, S slots, K steps, M supervised (slot, step) pairs, R target rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from torchspec.core.algorithms.base import DraftAlgorithm
from torchspec.core.algorithms.eagle3.batch import Batch, Plan, build_batch, halo
from torchspec.core.algorithms.eagle3.metrics import pair_sums
from torchspec.core.algorithms.lesson import lesson_of, result_of
from torchspec.core.algorithms.mtp import serving
from torchspec.core.algorithms.mtp.drafter import MtpDrafter
from torchspec.core.algorithms.mtp.geometry import Geometry, derive
from torchspec.core.algorithms.mtp.initialise import start_anew, start_from_target
from torchspec.core.algorithms.mtp.model import MtpDraft
from torchspec.core.algorithms.mtp.options import MtpOptions
from torchspec.core.errors import Problem
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
class Mtp(DraftAlgorithm[Plan, Batch]):
    """The algorithm for one target. `geometry` fixes the head; `create` reads it from the target's checkpoint.

    It taps the last layer alone, whose output is the hidden state *before* the target's final norm, for every engine
    and while decoding too; the family says whether the norm is then applied.
    """

    options: MtpOptions
    geometry: Geometry
    name: str = "mtp"

    @classmethod
    def create(cls, options: MtpOptions, target: TargetSpec) -> Mtp:
        """Raises ConfigError with everything about the options and the target's head that does not fit."""
        return cls.of(options, target, derive(options, target))

    @classmethod
    def of(cls, options: MtpOptions, target: TargetSpec, geometry: Geometry) -> Mtp:
        return cls(options=options, target=target, geometry=geometry, taps=(target.num_layers - 1,))

    @property
    def vocabulary_size(self) -> int:
        return self.geometry.vocab_size

    @property
    def layouts(self) -> tuple[str, ...]:
        from torchspec.core.algorithms.mtp import convert

        return convert.LAYOUTS

    def kept_values(
        self, *, recompute: bool, moment: Literal["loss", "backward"] = "backward", text: int | None = None
    ) -> float:
        """Once: the embedding, what proj made of it and of the first state. Per step: proj's output, the output, its
        gradient, k and v. Of each step: q and k before and after their norm, the output of the attention, the
        residual, the normed state, gate and up. Made again, these are there once and in the backward pass only. In the
        backward pass the outputs' gradients are scaled in a copy; later come gate, up and their product again as
        gradients, and those of all steps' k and v, when the last step's output and what stood beside it are gone."""
        geometry, steps = self.geometry, self.options.unroll
        size, heads = geometry.hidden_size, geometry.head_dim * geometry.num_attention_heads
        keys = geometry.head_dim * geometry.num_key_value_heads
        normed, biased = int(geometry.qk_norm), int(geometry.qkv_bias)
        layer = size + (2 + normed) * heads + normed * keys + 2 * geometry.intermediate_size
        layer += size + (size if geometry.rules.feeds_normed else 0)
        once = 3 * size if recompute else 2 * size
        once += size if geometry.rules.state == "post_norm" else 0
        kept = once + steps * (2 * size + 2 * keys) + (0 if recompute else steps * layer)
        if moment == "loss":
            return kept
        gradients = 3 * geometry.intermediate_size - size + biased * (heads + 2 * keys)
        if recompute:
            gradients += layer + steps * 2 * keys
        return kept + max(steps * size, gradients)

    def build_draft(self, vocabulary: VocabularyMap, head: TargetHead) -> MtpDraft:
        """A float32 draft on the CPU with the target's own head or a fresh one, as `init` says.

        Raises ConfigError for a pruned vocabulary, TargetError where the target's tensors cannot be read.
        """
        self.check_vocabulary(vocabulary)
        draft = MtpDraft(self.geometry)
        if self.options.init == "random":
            start_anew(draft, head)
        else:
            start_from_target(draft, head, self.target)
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
        assert isinstance(draft, MtpDraft)
        options = self.options
        lesson = lesson_of(options, batch, head, draft.vocabulary, device, memory, moment, decay=self.decay)

        def objective(outputs: list[Tensor], output_head: Head) -> tuple[Tensor, dict[str, Tensor]]:
            numerator, terms = distil(outputs, output_head, lesson.supervision, device.ops)
            return numerator, pair_sums(batch, terms) | {"loss_denominator": lesson.denominator(terms)}

        inputs = batch.inputs
        if self.geometry.rules.state == "post_norm":
            inputs = replace(inputs, taps_BSF=head.normed(inputs.taps_BSF, "pre_norm"))
        numerator, sums = draft(
            inputs,
            head,
            options.unroll,
            device,
            objective,
            shard_logits=memory.shard_logits,
            recompute=memory.recompute,
        )
        return result_of(numerator, sums)

    def drafter(self, draft: nn.Module, head: TargetHead, device: Device) -> MtpDrafter:
        """Drafts with the parameters `draft` holds now, in their precision; `draft` must not be sharded."""
        assert isinstance(draft, MtpDraft)
        return MtpDrafter(draft, head, device, self.taps)

    def to_files(self, draft_state: dict[str, Tensor], layout: str) -> DraftFiles:
        from torchspec.core.algorithms.mtp import convert

        return convert.to_files(self, draft_state, layout)

    def serve(
        self, files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor
    ) -> Tensor:
        return serving.serve(files, head, taps_TNH, next_tokens_T, drafted_L)

    def vocabulary_problems(self, vocabulary: VocabularyMap) -> list[Problem]:
        if vocabulary.size == self.geometry.vocab_size:
            return []
        return [
            Problem(
                field="draft",
                value=vocabulary.size,
                message=f"a head drafts all {self.geometry.vocab_size} tokens of its target, by the target's own "
                "output; the vocabulary map holds fewer",
                remedy="use the map that belongs to this draft and target",
            )
        ]
