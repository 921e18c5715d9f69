"""What users say of a draft of blocks; each algorithm derives its `draft` section from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from torchspec.core.algorithms.options import DraftOptions
from torchspec.core.config.schema import Positive
from torchspec.core.objectives.terms import Term, Weight

LayerKind = Literal["full", "sliding"]
GAMMA_OF_16 = 7.0


class BlockOptions(DraftOptions):
    taps: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        description="target layers whose outputs feed the draft, 0-based; default: five of n, evenly from 1 to n - 3",
    )
    vocab_size: Positive | None = Field(
        None, description="tokens of the draft vocabulary, those used most; default: all of the target's"
    )
    num_layers: Positive = Field(5, description="decoder layers of the draft")
    block_size: Annotated[int, Field(ge=2)] = Field(16, description="slots of a block; it drafts one token fewer")
    sample_from_anchor: bool = Field(
        False, description="the slot of the known token predicts too: a block drafts as many tokens as it has slots"
    )
    mask_token: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="token that stands for those to be drafted, best one that texts do not contain; default: the last "
        "of the target's embedding",
    )
    num_anchors: Positive = Field(
        512, description="blocks trained per sample and epoch, at positions drawn anew in every epoch"
    )
    intermediate_size: Positive | None = Field(None, description="width of the draft's MLP; default: the target's")
    num_attention_heads: Positive | None = Field(None, description="query heads of the draft; default: the target's")
    num_key_value_heads: Positive | None = Field(
        None, description="key and value heads of the draft; default: the target's"
    )
    head_dim: Positive | None = Field(None, description="size of a head; default: the target's")
    layer_types: tuple[LayerKind, ...] | None = Field(
        None,
        description="kind of each layer: full, or sliding (sees `sliding_window` positions back); default: all sliding "
        "if sliding_window is given, else all full",
    )
    sliding_window: Positive | None = Field(None, description="positions that a sliding layer sees, its own included")
    sliding_window_non_causal: bool = Field(
        False, description="slots of sliding layers see the later ones of their block, too"
    )
    objective: dict[Term, Weight] = Field(
        {"ground_truth": 1.0},
        min_length=1,
        description="terms of the loss and their weights, as for eagle3: ground_truth, cross_entropy, kl, reverse_kl, "
        "jsd, tv, lk_alpha, lk_lambda, argmax",
    )
    weighting: Literal["decay", "dpace"] = Field(
        "decay",
        description="how positions weigh: exp(-k / gamma), or by how much they add to the expected acceptance length "
        "as the draft is now (D-PACE, 2605.18810; one more pass over the logits, without gradients)",
    )
    gamma: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="weighting=decay: positions after which a weight is 1/e; default: 7 / 16 of block_size",
    )
    dpace_smoothing: float = Field(
        0.5, ge=0, le=1, description="weighting=dpace: what an unlikely token leaves of the rest"
    )

    def step_decay(self, block_size: int) -> float:
        """Weight of a step over that of the step before, in blocks of this size."""
        gamma = GAMMA_OF_16 * block_size / 16 if self.gamma is None else self.gamma
        return math.exp(-1 / gamma)

    def idle(self) -> Iterator[tuple[str, str]]:
        """See `ObjectiveOptions.idle`."""
        yield from super().idle()
        if self.weighting == "dpace":
            yield "gamma", "with draft.weighting=dpace"
        else:
            yield "dpace_smoothing", "without draft.weighting=dpace"
