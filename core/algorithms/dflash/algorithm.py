"""DFlash: the draft of blocks as it is, nothing added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from torchspec.core.algorithms.blocks.algorithm import BlockAlgorithm
from torchspec.core.algorithms.blocks.files import Format
from torchspec.core.algorithms.blocks.options import BlockOptions
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.engine import TargetSpec


@dataclass(frozen=True, kw_only=True)
class DFlash(BlockAlgorithm):
    form: ClassVar[Format] = Format(architecture="DFlashDraftModel", kind="dflash")
    title: ClassVar[str] = "a DFlash draft"
    name: str = "dflash"

    @classmethod
    def create(cls, options: BlockOptions, target: TargetSpec) -> Self:
        """See `BlockAlgorithm.create`. Raises ConfigError, too, for a draft that neither layout can hold."""
        made = super().create(options, target)
        if not made.layouts:
            problem = Problem(
                field="draft.layer_types",
                value=list(made.geometry.layer_types),
                message="engines read full and sliding layers beside each other from the plain layout alone, which has "
                "no draft.vocab_size and no draft.sample_from_anchor",
                remedy="leave those out, or train with draft.sliding_window_non_causal=true or layers of one kind",
            )
            raise ConfigError([problem])
        return made

    def to_files(self, draft_state: dict[str, Tensor], layout: str) -> DraftFiles:
        """As `blocks.files`; what can be said and no engine serves is in the notes."""
        made = super().to_files(draft_state, layout)
        return made if self.unserved is None else replace(made, notes=(*made.notes, self.unserved))

    @property
    def unserved(self) -> str | None:
        """See `AlgorithmSpec.unserved`."""
        if not self.geometry.sample_from_anchor:
            return None
        return (
            "no engine is known to serve a DFlash draft whose anchor's slot predicts: vLLM (seen in 0.32.0) refuses it "
            "and on a CPU takes every token from the slot behind its own. Train without draft.sample_from_anchor, with "
            f"draft.block_size={self.geometry.block_size + 1} for as many tokens"
        )
