"""EAGLE-3.1 (2605.09992) as defined in docs/concepts.md: registered as `eagle3.1`.

EAGLE-3 with two norms: of each tap before fc, and of what a step hands to the next. The draft, its batches and its
files are `torchspec.core.algorithms.eagle3`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchspec.core.algorithms.eagle3 import as_published, has_norms, is_eagle3
from torchspec.core.algorithms.eagle31.options import Eagle31Options
from torchspec.core.interfaces.algorithm import Algorithm, AlgorithmSpec, DraftFiles

if TYPE_CHECKING:
    from torch import nn

    from torchspec.core.interfaces.engine import TargetSpec


def _create(options: Eagle31Options, target: TargetSpec) -> Algorithm:
    from torchspec.core.algorithms.eagle31.algorithm import Eagle31

    return Eagle31.create(options, target)


def _reads(config: dict[str, Any]) -> bool:
    return is_eagle3(config) and has_norms(config)


def _from_files(files: DraftFiles, target: TargetSpec) -> tuple[Algorithm, nn.Module]:
    from torchspec.core.algorithms.eagle3.convert import from_files
    from torchspec.core.algorithms.eagle31.algorithm import Eagle31

    return from_files(files, target, Eagle31, Eagle31Options)


SPEC = AlgorithmSpec(
    name="eagle3.1",
    options=Eagle31Options,
    create=_create,
    reads=_reads,
    from_files=_from_files,
    published=as_published,
)
