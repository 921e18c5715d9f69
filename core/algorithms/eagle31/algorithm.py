"""EAGLE-3.1 for the trainer: EAGLE-3 whose geometry has the norms."""

from __future__ import annotations

from dataclasses import dataclass

from torchspec.core.algorithms.eagle3.algorithm import Eagle3


@dataclass(frozen=True, kw_only=True)
class Eagle31(Eagle3):
    """See `Eagle3`."""

    name: str = "eagle3.1"
