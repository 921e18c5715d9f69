"""The `draft` section of an MTP run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from torchspec.core.config.schema import Positive
from torchspec.core.objectives.terms import ObjectiveOptions, Term, Weight


class MtpOptions(ObjectiveOptions):
    objective: dict[Term, Weight] = Field(
        {"ground_truth": 1.0}, min_length=1, description=ObjectiveOptions.model_fields["objective"].description
    )
    init: Literal["target", "random"] = Field(
        "target", description="start from the head in the target's checkpoint, or from a fresh one"
    )
    init_from: Path | None = Field(None, description="exported draft or checkpoint to start from")
    family: Literal["mimo", "deepseek", "qwen"] | None = Field(
        None,
        description="how the head's tensors are named, and how its inputs are joined; default: as the target's "
        "checkpoint has them, for a fresh head mimo",
    )
    unroll: Positive = Field(3, description="how often the head is applied to its own output in training, K")
    step_decay: float = Field(0.6, gt=0, le=1, description="weight of step k is step_decay ** k")

    def idle(self) -> Iterator[tuple[str, str]]:
        """See `ObjectiveOptions.idle`."""
        yield from super().idle()
        yield "coverage", "for a head that says every token of its target"
