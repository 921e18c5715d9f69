"""DFlash (2602.06036): a block of tokens drafted in one pass, by block diffusion. Registered as `dflash`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchspec.core.algorithms.blocks.options import BlockOptions
from torchspec.core.interfaces.algorithm import Algorithm, AlgorithmSpec, DraftFiles

if TYPE_CHECKING:
    from torch import nn

    from torchspec.core.algorithms.dflash.algorithm import DFlash
    from torchspec.core.interfaces.engine import TargetSpec


def _create(options: BlockOptions, target: TargetSpec) -> Algorithm:
    from torchspec.core.algorithms.dflash.algorithm import DFlash

    return DFlash.create(options, target)


def _reads(config: dict[str, Any]) -> bool:
    from torchspec.core.algorithms.dflash.algorithm import DFlash

    return DFlash.form.reads(config)


def _from_files(files: DraftFiles, target: TargetSpec) -> tuple[Algorithm, nn.Module]:
    from torchspec.core.algorithms.dflash.algorithm import DFlash

    return DFlash.from_files(files, target)


def _published(files: DraftFiles, target: TargetSpec | None) -> DraftFiles:
    from torchspec.core.algorithms.dflash.algorithm import DFlash

    return DFlash.published(files, target)


def _unserved(algorithm: DFlash) -> str | None:
    return algorithm.unserved


SPEC = AlgorithmSpec(
    name="dflash",
    options=BlockOptions,
    create=_create,
    reads=_reads,
    from_files=_from_files,
    published=_published,
    unserved=_unserved,
)
