"""DSpark for the trainer: a draft of blocks with its loss, metrics, drafters and files.

The loss of a supervised (block, step) pair is the objective's, and beside it the binary cross-entropy of the pair's
confidence to alpha = sum_v min(p_full, q), the chance that a token drawn from q is accepted, as the draft is now (no
gradient through alpha). A pair teaches its confidence whether its target row counts in the objective or not: a token
that the draft cannot say is refused like any other.

|q - p|_1 of the published loss is 2 tv, for a pruned vocabulary as well: over all V tokens, with q = 0 outside the
draft's, it is 2 (1 - sum_v min(p_full, q)).

Shape letters: B rows, A blocks of a row, K steps, M supervised (block, step) pairs grouped by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchspec.core.algorithms.blocks.algorithm import BlockAlgorithm, BlockLesson
from torchspec.core.algorithms.blocks.body import BlockDraft, Drafted
from torchspec.core.algorithms.blocks.files import Format
from torchspec.core.algorithms.blocks.metrics import block_sums
from torchspec.core.algorithms.blocks.options import BlockOptions
from torchspec.core.algorithms.dspark import files, serving
from torchspec.core.algorithms.dspark.drafter import DSparkDrafter
from torchspec.core.algorithms.dspark.geometry import DSparkGeometry, derive
from torchspec.core.algorithms.dspark.metrics import confidence_sums, summarise_confidence
from torchspec.core.algorithms.dspark.model import DSparkDraft, start_heads
from torchspec.core.algorithms.dspark.options import DSparkOptions
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.distillation import distil


@dataclass(frozen=True, kw_only=True)
class DSpark(BlockAlgorithm):
    form: ClassVar[Format] = files.FORM
    title: ClassVar[str] = "a DSpark draft"
    options_class: ClassVar[type[BlockOptions]] = DSparkOptions
    gaps: ClassVar[bool] = False
    options: DSparkOptions
    geometry: DSparkGeometry
    name: str = "dspark"

    @classmethod
    def derive(
        cls, options: BlockOptions, target: TargetSpec, stated: Mapping[str, Any]
    ) -> tuple[DSparkGeometry, tuple[int, ...]]:
        """See `geometry.derive`. Raises ConfigError, too, for a draft that no engine could serve."""
        assert isinstance(options, DSparkOptions)
        geometry, taps = derive(options, target, stated)
        if not files.layouts(geometry):
            raise ConfigError(
                [
                    Problem(
                        field="draft.markov_head_type",
                        value=geometry.markov_head_type,
                        message="engines compute such a head in drafts of the whole vocabulary whose blocks sample "
                        "from the anchor, and in no others",
                        remedy="train a vanilla head, or leave out draft.vocab_size and draft.sample_from_anchor",
                    )
                ]
            )
        return geometry, taps

    @classmethod
    def from_files(cls, given: DraftFiles, target: TargetSpec) -> tuple[Self, BlockDraft]:
        """See `AlgorithmSpec.from_files`."""
        try:
            given = replace(given, config=files.completed(given.config))
        except ValueError as error:
            raise CheckpointError(f"config.json of the draft: {error}") from error
        algorithm, draft = super().from_files(given, target)
        options = algorithm.options.model_copy(
            update=files.stated_options(given.config, enabled=algorithm.geometry.enable_confidence_head)
        )
        return replace(algorithm, options=options), draft

    @classmethod
    def published(cls, given: DraftFiles, target: TargetSpec | None) -> DraftFiles:
        """See `AlgorithmSpec.published`."""
        try:
            config = dict(files.as_blocks(files.as_published(given.config)))
            if not cls.form.reads(config):
                return given
            config = files.completed(config)
        except ValueError as error:
            raise CheckpointError(f"config.json of the draft: {error}") from error
        return super().published(replace(given, config=config), target)

    @classmethod
    def stated_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `BlockAlgorithm.stated_fields`."""
        config = files.as_published(config)
        if cls.form.reads(config):
            config = files.completed(config)
        return super().stated_fields(files.as_blocks(config)) | files.stated_heads(config)

    @classmethod
    def own_tensors(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See `BlockAlgorithm.own_tensors`."""
        return serving.own_tensors(config)

    @property
    def layouts(self) -> tuple[str, ...]:
        return files.layouts(self.geometry)

    def kept_values(
        self, *, recompute: bool, moment: Literal["loss", "backward"] = "backward", text: int | None = None
    ) -> float:
        """Beside those of the body, until the backward pass comes to its layers, per slot: the normed output; of the
        Markov head e, f, a copy of f for each step and its gradient, and what lies between e and f; e once more for the
        confidence."""
        geometry = self.geometry
        between = {"vanilla": 0, "gated": 3, "rnn": 12}[geometry.markov_head_type]
        values = geometry.hidden_size + geometry.markov_rank * (3 + between + geometry.confidence_head_with_markov)
        loss = super().kept_values(recompute=recompute, moment="loss", text=text) + self.slots_per_token(text) * values
        if moment == "loss":
            return loss
        return max(loss, super().kept_values(recompute=recompute, text=text))

    def build_draft(self, vocabulary: VocabularyMap, head: TargetHead) -> BlockDraft:
        """See `BlockAlgorithm.build_draft`."""
        draft = super().build_draft(vocabulary, head)
        assert isinstance(draft, DSparkDraft)
        start_heads(draft)
        return draft

    def new_draft(self, vocabulary: VocabularyMap) -> BlockDraft:
        return DSparkDraft(self.geometry, vocabulary)

    def loss(self, draft: BlockDraft, drafted: Drafted, lesson: BlockLesson) -> tuple[Tensor, dict[str, Tensor]]:
        """See `BlockAlgorithm.loss`."""
        assert isinstance(draft, DSparkDraft)
        supervision, pairs = lesson.supervision, lesson.batch.pairs
        numerator, terms = distil(drafted.outputs, drafted.head, supervision, lesson.device.ops, extras=drafted.extras)
        sums = block_sums(lesson.batch, terms) | {"loss_denominator": lesson.denominator(terms)}
        if draft.confidence_head is None:
            return numerator, sums
        assert drafted.normed is not None
        before_RK = lesson.batch.inputs.before_BAK.flatten(0, 1)
        logit_M = draft.confidence(drafted.normed, before_RK).flatten()[pairs.cell_M].to(supervision.base_M.dtype)
        cost_M = F.binary_cross_entropy_with_logits(logit_M, terms.alpha_M, reduction="none")
        numerator = numerator + self.options.confidence_weight * torch.dot(supervision.base_M, cost_M)
        return numerator, sums | confidence_sums(logit_M.detach(), terms.alpha_M, pairs.sizes)

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float | list[float]]:
        """With the figures of `metrics.summarise_confidence`."""
        return super().summarise(sums) | summarise_confidence(sums)

    def drafter(self, draft: nn.Module, head: TargetHead, device: Device) -> DSparkDrafter:
        """See `BlockAlgorithm.drafter`."""
        assert isinstance(draft, DSparkDraft)
        return DSparkDrafter(draft, head, device, self.taps, self.options.min_confidence)

    def to_files(self, draft_state: dict[str, Tensor], layout: str) -> DraftFiles:
        return files.to_files(self, draft_state, layout)

    def serve(
        self, draft_files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor
    ) -> Tensor:
        self.check_taps(draft_files)
        return serving.serve(draft_files, head, taps_TNH, next_tokens_T, drafted_L)

    def extra_fields(self) -> Mapping[str, Any]:
        """See `BlockAlgorithm.extra_fields`."""
        return files.head_fields(self.geometry)
