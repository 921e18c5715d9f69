"""Samples that every rank of a group brings at once, each its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torchspec.core.errors import PeerError, SampleError
from torchspec.core.parallel.ranks import GivenRanks
from torchspec.core.training.brought import Required, arguments, brought
from torchspec.core.training.held import HeldSample


def brought_together(
    ranks: GivenRanks, required: Required, samples: Iterable[Mapping[str, Any]], version: int
) -> tuple[list[HeldSample], list[list[int]]]:
    """This rank's, of which each is the arguments of `OnlineDraftTrainer.add`, and the lengths of every rank's.

    Collective. No rank waits for one whose samples are refused: there it raises SampleError, elsewhere PeerError.
    """
    failure, held = None, list[HeldSample]()
    try:
        held = _brought(required, samples, version)
    except SampleError as error:
        failure = error
    mine = {"lengths": [each.length for each in held], "refused": None if failure is None else str(failure)}
    told = ranks.meet(mine, "call evaluate()")
    if failure is not None:
        raise failure
    for rank, each in enumerate(told):
        if each["refused"] is not None:
            raise PeerError(f"nothing was evaluated, as rank {rank} refused what it was given: {each['refused']}")
    return held, [each["lengths"] for each in told]


def _brought(required: Required, samples: object, version: int) -> list[HeldSample]:
    if isinstance(samples, Mapping) or not isinstance(samples, Iterable):
        raise SampleError(f"samples are of type {type(samples).__name__}, expected a list of the arguments of add()")
    held = []
    for number, each in enumerate(samples):
        given = arguments(number, each)
        features, sample = brought(required, **given)
        held.append(HeldSample(sample=sample, features=features, epoch=given.get("epoch", 0), version=version))
    return held
