"""EAGLE-3 (2503.01840) as defined in docs/concepts.md: registered as `eagle3`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.interfaces.algorithm import Algorithm, AlgorithmSpec

if TYPE_CHECKING:
    from torchspec.core.interfaces.engine import TargetSpec


def _create(options: Eagle3Options, target: TargetSpec) -> Algorithm:
    from torchspec.core.algorithms.eagle3.algorithm import Eagle3

    return Eagle3.create(options, target)


SPEC = AlgorithmSpec(name="eagle3", options=Eagle3Options, create=_create)
