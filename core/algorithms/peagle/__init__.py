"""P-EAGLE (2602.01469) as defined in docs/algorithms.md: registered as `peagle`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchspec.core.algorithms.peagle.options import PEagleOptions
from torchspec.core.interfaces.algorithm import Algorithm, AlgorithmSpec, DraftFiles

if TYPE_CHECKING:
    from torch import nn

    from torchspec.core.interfaces.engine import TargetSpec


def _create(options: PEagleOptions, target: TargetSpec) -> Algorithm:
    from torchspec.core.algorithms.peagle.algorithm import PEagle

    return PEagle.create(options, target)


def _reads(config: dict[str, Any]) -> bool:
    from torchspec.core.algorithms.peagle.plain import is_plain

    return bool(config.get("speculators_model_type") == "peagle") or is_plain(config)


def _from_files(files: DraftFiles, target: TargetSpec) -> tuple[Algorithm, nn.Module]:
    from torchspec.core.algorithms.peagle.convert import from_files

    return from_files(files, target)


def _published(files: DraftFiles, target: TargetSpec | None) -> DraftFiles:
    from torchspec.core.algorithms.peagle.plain import published

    return published(files)


SPEC = AlgorithmSpec(
    name="peagle",
    options=PEagleOptions,
    create=_create,
    reads=_reads,
    from_files=_from_files,
    published=_published,
)
