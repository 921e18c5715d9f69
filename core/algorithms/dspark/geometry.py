"""The sizes of a DSpark draft: those of a draft of blocks, and its two heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchspec.core.algorithms.blocks import geometry as blocks
from torchspec.core.algorithms.blocks.geometry import BlockGeometry
from torchspec.core.algorithms.dspark.options import DSparkOptions
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.geometry import Sources


@dataclass(frozen=True, kw_only=True)
class DSparkGeometry(BlockGeometry):
    """`confidence_head_with_markov` is False without a confidence head."""

    markov_rank: int
    markov_head_type: str
    enable_confidence_head: bool
    confidence_head_with_markov: bool


def derive(
    options: DSparkOptions, target: TargetSpec, stated: Mapping[str, Any]
) -> tuple[DSparkGeometry, tuple[int, ...]]:
    """As `blocks.geometry.derive`."""
    problems: list[Problem] = []
    sources = Sources(options=options, stated=stated, target=target, problems=problems)
    wanted = options.confidence_weight > 0
    enabled = stated.get("enable_confidence_head", wanted)
    if "confidence_weight" in options.model_fields_set and enabled != wanted:
        problems.append(
            Problem(
                field="draft.confidence_weight",
                value=options.confidence_weight,
                message=f"the draft config says that enable_confidence_head is {enabled}",
                remedy="give it in one place",
            )
        )
    with_markov = sources.pick("confidence_head_with_markov", options.confidence_head_with_markov)
    heads = {
        "markov_rank": sources.pick("markov_rank", options.markov_rank),
        "markov_head_type": sources.pick("markov_head_type", options.markov_head_type),
        "enable_confidence_head": enabled,
        "confidence_head_with_markov": enabled and with_markov,
    }
    if options.min_confidence > 0 and not enabled:
        problems.append(
            Problem(
                field="draft.min_confidence",
                value=options.min_confidence,
                message="the draft has no confidence head",
                remedy="leave it out, or train one with a draft.confidence_weight above 0",
            )
        )
    try:
        body, taps = blocks.derive(options, target, stated)
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from error
    if problems:
        raise ConfigError(problems)
    return DSparkGeometry(**vars(body), **heads), taps
