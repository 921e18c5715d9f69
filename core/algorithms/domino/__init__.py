"""Domino (2605.29707): a block drafted at once, whose later tokens are corrected by the earlier ones.

A draft of blocks; a GRU reads the tokens chosen so far and adds to the logits of the next. Registered as `domino`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchspec.core.algorithms.domino.options import DominoOptions
from torchspec.core.interfaces.algorithm import Algorithm, AlgorithmSpec, DraftFiles

if TYPE_CHECKING:
    from torch import nn

    from torchspec.core.interfaces.engine import TargetSpec


def _create(options: DominoOptions, target: TargetSpec) -> Algorithm:
    from torchspec.core.algorithms.domino.algorithm import Domino

    return Domino.create(options, target)


def _reads(config: dict[str, Any]) -> bool:
    from torchspec.core.algorithms.domino.algorithm import Domino

    return Domino.form.reads(config)


def _from_files(files: DraftFiles, target: TargetSpec) -> tuple[Algorithm, nn.Module]:
    from torchspec.core.algorithms.domino.algorithm import Domino

    return Domino.from_files(files, target)


def _published(files: DraftFiles, target: TargetSpec | None) -> DraftFiles:
    from torchspec.core.algorithms.domino.algorithm import Domino

    return Domino.published(files, target)


SPEC = AlgorithmSpec(
    name="domino",
    options=DominoOptions,
    create=_create,
    reads=_reads,
    from_files=_from_files,
    published=_published,
)
