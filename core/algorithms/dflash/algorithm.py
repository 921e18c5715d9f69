"""DFlash: the draft of blocks as it is, nothing added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torchspec.core.algorithms.blocks.algorithm import BlockAlgorithm
from torchspec.core.algorithms.blocks.files import Format


@dataclass(frozen=True, kw_only=True)
class DFlash(BlockAlgorithm):
    form: ClassVar[Format] = Format(architecture="DFlashDraftModel", kind="dflash")
    title: ClassVar[str] = "a DFlash draft"
    name: str = "dflash"
