"""What users say of a Domino draft: the `draft` section of its configuration."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from torchspec.core.algorithms.blocks.options import BlockOptions
from torchspec.core.config.schema import Positive
from torchspec.core.objectives.terms import Course


class Curriculum(Course):
    """Of the share of the loss that the uncorrected logits have, the corrected ones having the rest."""

    start: float = Field(1.0, ge=0, le=1, description="share of the uncorrected logits in the loss at the first step")
    end: float = Field(0.0, ge=0, le=1, description="that share from `until` on")
    until: float = Field(0.5, gt=0, le=1, description="share of all steps after which it stays at `end`")


class DominoOptions(BlockOptions):
    gru_hidden_dim: Positive = Field(1024, description="width of the state that reads the tokens chosen so far")
    emb_dim: Positive = Field(256, description="width of the correction before it is mapped to the vocabulary")
    curriculum: Curriculum = Curriculum()

    def idle(self) -> Iterator[tuple[str, str]]:
        """See `ObjectiveOptions.idle`."""
        yield from super().idle()
        yield "coverage", "for a draft that says every token of its target"
