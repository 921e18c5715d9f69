"""DSpark (2607.05147): a block whose tokens are chosen one after the other, and how sure the draft is of each.

A draft of blocks, whose logits get a bias made of the token before (a Markov head), and a head that says how likely
each token is to be accepted. Registered as `dspark`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchspec.core.algorithms.dspark.options import DSparkOptions
from torchspec.core.interfaces.algorithm import Algorithm, AlgorithmSpec, DraftFiles

if TYPE_CHECKING:
    from torch import nn

    from torchspec.core.interfaces.engine import TargetSpec


def _create(options: DSparkOptions, target: TargetSpec) -> Algorithm:
    from torchspec.core.algorithms.dspark.algorithm import DSpark

    return DSpark.create(options, target)


def _reads(config: dict[str, Any]) -> bool:
    from torchspec.core.algorithms.dspark.algorithm import DSpark

    return DSpark.form.reads(config)


def _from_files(files: DraftFiles, target: TargetSpec) -> tuple[Algorithm, nn.Module]:
    from torchspec.core.algorithms.dspark.algorithm import DSpark

    return DSpark.from_files(files, target)


def _published(files: DraftFiles, target: TargetSpec | None) -> DraftFiles:
    from torchspec.core.algorithms.dspark.algorithm import DSpark

    return DSpark.published(files, target)


SPEC = AlgorithmSpec(
    name="dspark",
    options=DSparkOptions,
    create=_create,
    reads=_reads,
    from_files=_from_files,
    published=_published,
)
