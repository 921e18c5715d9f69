"""The `draft` section of a P-EAGLE run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from torchspec.core.algorithms.options import DraftOptions
from torchspec.core.config.schema import Positive


class PEagleOptions(DraftOptions):
    taps: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="target layers whose outputs feed the draft, 0-based; default: [1, n // 2 - 1, n - 4] of n"
    )
    vocab_size: Positive | None = Field(
        None,
        description="tokens of the draft vocabulary, those used most; default: min(32000, the target's)",
    )
    num_layers: Positive = Field(4, description="decoder layers of the draft; the first one reads the taps")
    mask_token: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="token that stands for those to be drafted, best one that texts do not contain; default: the last "
        "of the target's embedding",
    )
    hidden_size: Positive | None = Field(None, description="hidden size of the draft; default: the target's")
    intermediate_size: Positive | None = Field(None, description="width of the draft's MLP; default: the target's")
    num_attention_heads: Positive | None = Field(None, description="query heads of the draft; default: the target's")
    num_key_value_heads: Positive | None = Field(
        None, description="key and value heads of the draft; default: the target's"
    )
    head_dim: Positive | None = Field(None, description="size of a head; default: the target's")
    norm_before_residual: bool = Field(False, description="the first layer's residual branch is the normed feature")
    depths: Annotated[int, Field(ge=2)] = Field(8, description="tokens drafted at once, K")
    depth_ratio: float = Field(
        0.7,
        gt=0,
        le=1,
        description="depth j is trained at a share depth_ratio ** j of the positions, drawn anew in every epoch; 1: at "
        "all of them",
    )
    depth_ratio_min: float = Field(
        0.2, ge=0, le=1, description="least share of the positions at which a depth is trained"
    )
    depth_decay: float = Field(
        1.0, gt=0, le=1, description="weight of depth j is depth_decay ** j, beside there being fewer positions of it"
    )

    def idle(self) -> Iterator[tuple[str, str]]:
        """See `ObjectiveOptions.idle`."""
        yield from super().idle()
        if self.depth_ratio == 1:
            yield "depth_ratio_min", "with draft.depth_ratio=1"
