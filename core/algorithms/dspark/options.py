"""What users say of a DSpark draft: the `draft` section of its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from torchspec.core.algorithms.blocks.options import BlockOptions
from torchspec.core.config.schema import Positive
from torchspec.core.objectives.terms import Term, Weight

HeadType = Literal["vanilla", "gated", "rnn"]


class DSparkOptions(BlockOptions):
    block_size: Annotated[int, Field(ge=2)] = Field(
        7, description="slots of a block; it drafts as many tokens, one fewer without sample_from_anchor"
    )
    sample_from_anchor: bool = Field(
        True, description="the slot of the known token predicts too: a block drafts as many tokens as it has slots"
    )
    markov_rank: Positive = Field(256, description="width of the Markov head: numbers that it keeps of a token")
    markov_head_type: HeadType = Field(
        "vanilla",
        description="what the bias of a token's logits is made of: the token before (vanilla), that token through a "
        "gate that reads the draft's state, too (gated), or a recurrent state over the block (rnn)",
    )
    confidence_weight: float = Field(
        1.0,
        ge=0,
        description="weight in the loss of the head that learns how likely each token is accepted; 0: no such head",
    )
    confidence_head_with_markov: bool = Field(
        True, description="the confidence head reads the token before, too, as the Markov head embeds it"
    )
    min_confidence: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="in torchspec's own decoder, a block ends before the first token whose chance to be accepted with "
        "all before it, as the confidence head sees it, is below this; 0: never",
    )
    objective: dict[Term, Weight] = Field(
        {"ground_truth": 0.1, "tv": 1.8},
        min_length=1,
        description="terms of the loss and their weights, as for eagle3; the default is 0.1 of the text's "
        "cross-entropy and 0.9 of the L1 distance between draft and target, which is 2 tv",
    )
    gamma: Annotated[float, Field(gt=0)] | None = Field(
        4.0,
        description="weighting=decay: positions after which a weight is 1/e; null: 7 / 16 of block_size",
    )

    def idle(self) -> Iterator[tuple[str, str]]:
        """See `ObjectiveOptions.idle`."""
        yield from super().idle()
        if self.confidence_weight == 0:
            yield "confidence_head_with_markov", "without a confidence head (draft.confidence_weight=0)"
