"""A draft of blocks for the trainer: runs a micro-batch, sums the metrics, hands out drafters. To be derived from.

Shape letters: B rows, A blocks of a row, K steps, M supervised (block, step) pairs, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from torchspec.core.algorithms.base import DraftAlgorithm
from torchspec.core.algorithms.blocks import files, serving
from torchspec.core.algorithms.blocks.batch import Batch, Plan, build_batch
from torchspec.core.algorithms.blocks.body import BlockDraft, Drafted
from torchspec.core.algorithms.blocks.drafter import BlockDrafter
from torchspec.core.algorithms.blocks.files import Format
from torchspec.core.algorithms.blocks.geometry import BlockGeometry, derive
from torchspec.core.algorithms.blocks.initialise import initialise
from torchspec.core.algorithms.blocks.metrics import block_sums
from torchspec.core.algorithms.blocks.options import BlockOptions
from torchspec.core.algorithms.blocks.published import published
from torchspec.core.algorithms.lesson import Lesson, lesson_of, result_of
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.export.draft_config import completed, read_config
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
from torchspec.core.objectives.distillation import distil
from torchspec.core.objectives.dpace import dpace_weights
from torchspec.core.objectives.teacher import OUTSIDE


@dataclass(frozen=True, kw_only=True)
class BlockLesson(Lesson):
    """Of a batch of blocks."""

    batch: Batch
    device: Device


@dataclass(frozen=True, kw_only=True)
class BlockAlgorithm(DraftAlgorithm[Plan, Batch]):
    """The algorithm for one target. `geometry` fixes the draft.

    Of a class:

    form       how files name such a draft
    title      how messages do
    gaps       whether a block goes on to be supervised behind a token that is not
    """

    form: ClassVar[Format]
    title: ClassVar[str]
    options_class: ClassVar[type[BlockOptions]] = BlockOptions
    gaps: ClassVar[bool] = True
    options: BlockOptions
    geometry: BlockGeometry
    name: str = "blocks"

    @classmethod
    def create(cls, options: BlockOptions, target: TargetSpec) -> Self:
        """Raises ConfigError with everything about the options that does not fit the target."""
        stated: dict[str, Any] = {}
        if options.config is not None:
            try:
                stated = cls.stated_fields(read_config(options.config))
            except ValueError as error:
                raise ConfigError(
                    [Problem(field="draft.config", value=str(options.config), message=str(error))]
                ) from error
        geometry, taps = cls.derive(options, target, stated)
        return cls(options=options, target=target, geometry=geometry, taps=taps)

    @classmethod
    def from_files(cls, given: DraftFiles, target: TargetSpec) -> tuple[Self, BlockDraft]:
        """See `AlgorithmSpec.from_files`."""
        try:
            stated = cls.stated_fields(given.config)
        except ValueError as error:
            raise CheckpointError(f"config.json of the draft: {error}") from error
        serving.check_names(given, cls.own_tensors(given.config))
        options = cls.options_class()
        try:
            geometry, taps = cls.derive(options, target, stated)
        except ConfigError as error:
            listed = "\n".join(f"  - {problem}" for problem in error.problems)
            raise CheckpointError(f"this draft does not fit the target {target.path}:\n{listed}") from error
        options = options.model_copy(
            update={"taps": taps, "vocab_size": geometry.draft_vocab_size, "block_size": geometry.block_size}
        )
        algorithm = cls(options=options, target=target, geometry=geometry, taps=taps)
        return algorithm, files.load_draft(algorithm, given)

    @classmethod
    def derive(
        cls, options: BlockOptions, target: TargetSpec, stated: Mapping[str, Any]
    ) -> tuple[BlockGeometry, tuple[int, ...]]:
        """See `geometry.derive`."""
        return derive(options, target, stated)

    @classmethod
    def stated_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a draft's config.json says of the geometry; ValueError for one of another algorithm.

        One that names no draft at all is taken for the sizes it states.
        """
        kind = config.get("speculators_model_type") or config.get("architectures")
        if kind is not None and not cls.form.reads(config):
            raise ValueError(
                f"it describes {kind!r}, and {cls.title} here has {cls.form.kind or cls.form.architecture!r}"
            )
        return files.stated_fields(completed(config), cls.title)

    @classmethod
    def published(cls, given: DraftFiles, target: TargetSpec | None) -> DraftFiles:
        """See `AlgorithmSpec.published`."""
        return published(given, target) if cls.form.reads(given.config) else given

    @classmethod
    def own_tensors(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the tensors that a draft with this config has beside those of the body."""
        return ()

    @property
    def layouts(self) -> tuple[str, ...]:
        return files.layouts(self.form, self.geometry)

    @property
    def attention_shape(self) -> AttentionShape:
        """See `Algorithm.attention_shape`; every layer's slots meet the context once."""
        geometry = self.geometry
        return AttentionShape(
            query_heads=geometry.num_attention_heads,
            key_heads=geometry.num_key_value_heads,
            head_size=geometry.head_dim,
            steps=1,
            layers=len(geometry.layer_types),
            slots=geometry.block.size,
            anchors=self.options.num_anchors,
        )

    @property
    def loss_steps(self) -> int:
        """See `Algorithm.loss_steps`."""
        return self.geometry.block.steps

    @property
    def halo(self) -> int:
        """See `Algorithm.halo`."""
        return self.geometry.block.halo

    @property
    def decay(self) -> float:
        return self.options.step_decay(self.geometry.block_size)

    def kept_values(
        self, *, recompute: bool, moment: Literal["loss", "backward"] = "backward", text: int | None = None
    ) -> float:
        """Per token of the text: fc's output, its norm, and every layer's keys and values. Per slot, of which there are
        as many as a document's anchors allow: the embedding, each layer's input, q, k, v before and after their norms,
        the attention's output, the residual, gate and up; of layers that are made again the input alone, and one
        layer's in the backward pass. The steps' outputs have a gradient each, which is scaled in a copy."""
        geometry, slots = self.geometry, self.slots_per_token(text)
        size, layers = geometry.hidden_size, len(geometry.layer_types)
        heads = geometry.head_dim * geometry.num_attention_heads
        keys = geometry.head_dim * geometry.num_key_value_heads
        context = 2 * size + layers * 3 * keys
        layer = size + 4 * heads + 3 * keys + 2 * geometry.intermediate_size
        kept = context + slots * (2 * size + (layers * size if recompute else layers * (size + layer)))
        if moment == "loss":
            return kept
        gradients = 3 * geometry.intermediate_size + size + (layer if recompute else 0)
        return kept + slots * max(size, gradients)

    def slots_per_token(self, text: int | None) -> float:
        """Slots that run for each token of texts of so many tokens, all supervised."""
        return self.attention_shape.share(text) * self.geometry.block.size

    def build_draft(self, vocabulary: VocabularyMap, head: TargetHead) -> BlockDraft:
        """A fresh float32 draft on the CPU. Raises ConfigError for a vocabulary map of other sizes, and for a mask
        token whose embedding says nothing."""
        if problems := self.vocabulary_problems(vocabulary) + self._mask_token_problems(head):
            raise ConfigError(problems)
        draft = self.new_draft(vocabulary)
        initialise(draft, head)
        return draft

    def new_draft(self, vocabulary: VocabularyMap) -> BlockDraft:
        """Without meaningful weights."""
        return BlockDraft(self.geometry, vocabulary)

    def plan(self, head: TargetHead, loss_bytes: int, memory: StepMemory = KEEP_ALL) -> Plan:
        geometry = self.geometry
        return Plan(
            shape=geometry.block,
            masks={kind: geometry.mask_of(kind) for kind in sorted(set(geometry.layer_types))},
            anchors=self.options.num_anchors,
            gaps=self.gaps,
            **self.taught_by(head, loss_bytes, memory),
        )

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
        assert isinstance(draft, BlockDraft)
        lesson = self._lesson(draft.vocabulary, head, batch, device, memory, moment)

        def objective(drafted: Drafted) -> tuple[Tensor, dict[str, Tensor]]:
            return self.loss(draft, drafted, self._paced(drafted, lesson))

        numerator, sums = draft(
            batch.inputs, head, device, objective, shard_logits=memory.shard_logits, recompute=memory.recompute
        )
        return result_of(numerator, sums)

    def loss(self, draft: BlockDraft, drafted: Drafted, lesson: BlockLesson) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum over pairs of what they cost, the sums); called within the draft's forward pass."""
        numerator, terms = distil(
            drafted.outputs, drafted.head, lesson.supervision, lesson.device.ops, extras=drafted.extras
        )
        return numerator, block_sums(lesson.batch, terms) | {"loss_denominator": lesson.denominator(terms)}

    def _lesson(
        self,
        vocabulary: VocabularyMap,
        head: TargetHead,
        batch: Batch,
        device: Device,
        memory: StepMemory,
        moment: Moment,
    ) -> BlockLesson:
        paced = self.options.weighting == "dpace"
        lesson = lesson_of(
            self.options, batch, head, vocabulary, device, memory, moment, decay=1.0 if paced else self.decay,
            truth=paced, counts=paced,
        )  # fmt: skip
        return BlockLesson(**vars(lesson), batch=batch, device=device)

    @torch.no_grad()
    def _paced(self, drafted: Drafted, lesson: BlockLesson) -> BlockLesson:
        """With the weights of D-PACE, for which a pass without gradients looks how likely the text's tokens are."""
        if self.options.weighting != "dpace":
            return lesson
        supervision, pairs = lesson.supervision, lesson.batch.pairs
        asked = replace(supervision, weights={"ground_truth": 1.0})
        _, terms = distil(drafted.outputs, drafted.head, asked, lesson.device.ops, extras=drafted.extras)
        assert terms.truth_M is not None
        assert supervision.truth_M is not None
        # What the draft cannot say it never gets right.
        cost_M = terms.truth_M.masked_fill(supervision.truth_M == OUTSIDE, math.inf)
        blocks = lesson.batch.blocks.anchor_BA.numel()
        cost_AK = cost_M.new_zeros(blocks, len(pairs.sizes))
        said_AK = torch.zeros(cost_AK.shape, dtype=torch.bool, device=cost_AK.device)
        cost_AK.view(-1)[pairs.cell_M] = cost_M
        said_AK.view(-1)[pairs.cell_M] = True
        weight_AK = dpace_weights(cost_AK, said_AK, smoothing=self.options.dpace_smoothing)
        base_M = supervision.base_M * weight_AK.view(-1)[pairs.cell_M].to(supervision.base_M.dtype)
        return replace(lesson, supervision=replace(supervision, base_M=base_M))

    def drafter(self, draft: nn.Module, head: TargetHead, device: Device) -> BlockDrafter:
        """Drafts with the parameters `draft` holds now, in their precision; `draft` must not be sharded."""
        assert isinstance(draft, BlockDraft)
        return BlockDrafter(draft, head, device, self.taps)

    def to_files(self, draft_state: dict[str, Tensor], layout: str) -> DraftFiles:
        return files.to_files(self, draft_state, layout)

    def serve(
        self, draft_files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor
    ) -> Tensor:
        self.check_taps(draft_files)
        return serving.serve(draft_files, head, taps_TNH, next_tokens_T, drafted_L)

    def check_taps(self, draft_files: DraftFiles) -> None:
        """CheckpointError where an engine would tap other layers than `taps`."""
        self.check_served_taps(serving.served_taps(draft_files.config))

    def extra_fields(self) -> Mapping[str, Any]:
        """What the algorithm adds to config.json."""
        return {}

    def _mask_token_problems(self, head: TargetHead) -> list[Problem]:
        mask = self.geometry.block.mask_token
        if head.embedding_VH.is_meta or bool(head.embedding_VH[mask].any()):
            return []
        return [
            Problem(
                field="draft.mask_token",
                value=mask,
                message="the target's embedding of it is zero, so that a block's slots could not tell their places",
                remedy="name a token with an embedding, best one that texts do not contain",
            )
        ]
