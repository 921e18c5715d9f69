"""Domino for the trainer: a draft of blocks with its correction, its loss and its files.

The loss is (1 - lambda) L(corrected logits) + lambda L(logits without the correction), L the objective's, lambda
falling from 1 to 0 over the first half of the training (`draft.curriculum`).

Shape letters: M supervised (block, step) pairs grouped by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchspec.core.algorithms.blocks.algorithm import BlockAlgorithm, BlockLesson
from torchspec.core.algorithms.blocks.body import BlockDraft, Drafted
from torchspec.core.algorithms.blocks.files import Format
from torchspec.core.algorithms.blocks.options import BlockOptions
from torchspec.core.algorithms.domino import serving
from torchspec.core.algorithms.domino.correction import DominoDraft, start_correction
from torchspec.core.algorithms.domino.geometry import DominoGeometry, derive
from torchspec.core.algorithms.domino.options import DominoOptions
from torchspec.core.algorithms.domino.serving import SHIFT
from torchspec.core.algorithms.metrics import per_step
from torchspec.core.export.draft_config import copy_field, object_at
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.objectives.distillation import distil

SIZES = ("gru_hidden_dim", "emb_dim")


@dataclass(frozen=True, kw_only=True)
class Domino(BlockAlgorithm):
    form: ClassVar[Format] = Format(
        architecture="DFlashDraftModel",
        kind=None,
        says_anchor=True,
        projector="domino",
        aliases=("DominoDraftModel",),  # SpecForge's
    )
    title: ClassVar[str] = "a Domino draft"
    options_class: ClassVar[type[BlockOptions]] = DominoOptions
    options: DominoOptions
    geometry: DominoGeometry
    name: str = "domino"

    @classmethod
    def derive(
        cls, options: BlockOptions, target: TargetSpec, stated: Mapping[str, Any]
    ) -> tuple[DominoGeometry, tuple[int, ...]]:
        """See `geometry.derive`."""
        assert isinstance(options, DominoOptions)
        return derive(options, target, stated)

    @classmethod
    def stated_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `BlockAlgorithm.stated_fields`; published configs say it in `dflash_config` or beside it."""
        fields = super().stated_fields(config)
        said = {**config, **object_at(config, "domino_config"), **object_at(config, "dflash_config")}
        shifted: dict[str, Any] = {}
        copy_field(shifted, SHIFT, said, bool)
        fields.pop("sample_from_anchor", None)  # what readers of Domino go by is its own word
        if shifted:
            fields["sample_from_anchor"] = shifted[SHIFT]
        for name, wanted in serving.CONSTANT.items():
            if said.get(name, wanted) != wanted:
                raise ValueError(f"{name} is {said[name]!r}; {cls.title} here has {wanted!r}")
        for name in SIZES:
            copy_field(fields, name, said, int)
        return fields

    @classmethod
    def own_tensors(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See `BlockAlgorithm.own_tensors`."""
        return serving.OWN

    def kept_values(
        self, *, recompute: bool, moment: Literal["loss", "backward"] = "backward", text: int | None = None
    ) -> float:
        """Beside those of the body, per slot: the normed output and the token's embedding; the state, its gates and a
        copy of it; the correction before and after its activation, a copy for each step and its gradient. These are
        gone when the layers' gradients come."""
        geometry = self.geometry
        values = 2 * geometry.hidden_size + 7 * geometry.gru_hidden_dim + 4 * geometry.emb_dim
        at_loss = super().kept_values(recompute=recompute, moment="loss", text=text)
        at_loss += self.slots_per_token(text) * values
        if moment == "loss":
            return at_loss
        return max(at_loss, super().kept_values(recompute=recompute, text=text))

    def build_draft(self, vocabulary: VocabularyMap, head: TargetHead) -> BlockDraft:
        """See `BlockAlgorithm.build_draft`."""
        draft = super().build_draft(vocabulary, head)
        assert isinstance(draft, DominoDraft)
        start_correction(draft)
        return draft

    def new_draft(self, vocabulary: VocabularyMap) -> BlockDraft:
        return DominoDraft(self.geometry, vocabulary)

    def loss(self, draft: BlockDraft, drafted: Drafted, lesson: BlockLesson) -> tuple[Tensor, dict[str, Tensor]]:
        """See `BlockAlgorithm.loss`. The share depends on the progress alone, so ranks agree on the passes."""
        share = self.options.curriculum.at(lesson.moment.progress)
        numerator, sums = super().loss(draft, drafted, lesson)
        if share == 0:
            return numerator, sums
        plain = replace(drafted.head, extra_NX=None)
        base, terms = distil(drafted.outputs, plain, lesson.supervision, lesson.device.ops)
        numerator = torch.lerp(numerator, base, share)
        return numerator, sums | {"base_correct": per_step(terms.agree_M, lesson.batch.pairs.sizes)}

    def summarise(self, sums: dict[str, Tensor]) -> dict[str, float | list[float]]:
        """With `base_accuracy_per_position`, of the logits without the correction, while they are trained."""
        figures = super().summarise(sums)
        if "base_correct" in sums:
            accuracy_K = sums["base_correct"].double() / sums["supervised"].double().clamp_min(1)
            figures["base_accuracy_per_position"] = accuracy_K.tolist()
        return figures

    def to_files(self, draft_state: dict[str, Tensor], layout: str) -> DraftFiles:
        """What is Domino's stands in `dflash_config`, where every reader looks for it."""
        made = super().to_files(draft_state, layout)
        geometry = self.geometry
        own = serving.CONSTANT | {SHIFT: geometry.sample_from_anchor}
        own |= {name: getattr(geometry, name) for name in SIZES}
        config = {**made.config, "dflash_config": {**made.config["dflash_config"], **own}}
        del config["sample_from_anchor"]  # its own word says it
        notes = ["SGLang reads Domino drafts (seen in 0.5.23): on CUDA, greedily, with a target whose weights are bf16"]
        if geometry.sample_from_anchor:
            notes.append(
                f"SGLang takes {geometry.block_size - 1} tokens of a block, not the last one that it says: "
                f"torchspec eval --draft-length {geometry.block_size - 1} measures what is served"
            )
        return replace(made, config=config, notes=(*made.notes, *notes))

    def serve(
        self, draft_files: DraftFiles, head: TargetHead, taps_TNH: Tensor, next_tokens_T: Tensor, drafted_L: Tensor
    ) -> Tensor:
        self.check_taps(draft_files)
        return serving.serve(draft_files, head, taps_TNH, next_tokens_T, drafted_L)
