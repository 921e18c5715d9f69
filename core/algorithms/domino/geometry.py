"""The sizes of a Domino draft: those of a draft of blocks, and of what corrects it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchspec.core.algorithms.blocks import geometry as blocks
from torchspec.core.algorithms.blocks.geometry import BlockGeometry
from torchspec.core.algorithms.domino.options import DominoOptions
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.geometry import Sources


@dataclass(frozen=True, kw_only=True)
class DominoGeometry(BlockGeometry):
    gru_hidden_dim: int
    emb_dim: int


def derive(
    options: DominoOptions, target: TargetSpec, stated: Mapping[str, Any]
) -> tuple[DominoGeometry, tuple[int, ...]]:
    """As `blocks.geometry.derive`. Raises ConfigError, too, for what the published layout cannot hold."""
    problems: list[Problem] = []
    sources = Sources(options=options, stated=stated, target=target, problems=problems)
    sizes = {
        "gru_hidden_dim": sources.pick("gru_hidden_dim", options.gru_hidden_dim),
        "emb_dim": sources.pick("emb_dim", options.emb_dim),
    }
    try:
        body, taps = blocks.derive(options, target, stated)
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from error
    if body.block_size == 2:
        problems.append(
            Problem(
                field="draft.block_size",
                value=2,
                message="no token of such a block is corrected: the first one never is",
                remedy="draft.block_size=3 or more",
            )
        )
    if body.draft_vocab_size != body.vocab_size:
        problems.append(
            Problem(
                field="draft.vocab_size",
                value=body.draft_vocab_size,
                message="a Domino draft says every token of its target: its layout has no head and no map of tokens",
                remedy="leave it out",
            )
        )
    if problems:
        raise ConfigError(problems)
    return DominoGeometry(**vars(body), **sizes), taps
