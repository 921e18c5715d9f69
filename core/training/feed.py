"""Where a forward pass gets its features from; the trainer is the same whoever makes them, and wherever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.features import Features, Quarantined
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.capturing import Documents, Model, Samples, capture, captured_rows
from torchspec.core.training.plan import Plan, Turn
from torchspec.core.training.written import WrittenNow


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Of one rank's feed, as JSON.

    held_bytes      of features that were asked for and are not used yet
    budget_bytes    most that these may be; a single turn may be larger
    turns_ahead     forward passes that were asked for
    engines         of each engine as it last said: tokens a second while it works, the fraction of time it works, and
                    records and bytes of features that wait there
    """

    held_bytes: int
    budget_bytes: int
    turns_ahead: int
    engines: tuple[dict[str, float], ...] = ()


class Passes(Protocol):
    """The forward passes of one rank. Ranks that share sequences, or a target, call the same methods at the same
    places."""

    def load(self, turn: Turn, samples: Samples) -> Mapping[int, Documents]:
        """The turn's micro-batches, before `rows` of the same turn."""
        ...

    def rows(self, turn: Turn, loaded: Mapping[int, Documents]) -> tuple[FeatureRows, dict[int, str]]:
        """This rank's share of the turn, and its holes: number of a document -> why there are no features of it.

        `loaded` are the turn's micro-batches. Of ranks that share a sequence one may know a reason and others "".
        """
        ...


class Feed(Passes, Protocol):
    """Those of a run that plans ahead."""

    def start(self, plan: Plan, samples: Samples, step: int, stop: int) -> None:
        """The steps from `step` to before `stop` come, in order: `rows` will be asked for each of their turns."""
        ...

    def whole(self, sample: TrainingSample) -> Features | Quarantined:
        """All features of one sample, outside the plan; this rank alone asks."""
        ...

    def flow(self) -> Flow | None:
        """How it stands now; None where nothing flows."""
        ...

    def close(self) -> None: ...


class DirectFeed:
    """The model's engine makes them when they are asked for; `written` has it write the answers before."""

    def __init__(self, model: Model, context: ParallelContext, written: WrittenNow | None = None) -> None:
        self._model, self._context, self._written = model, context, written

    def start(self, plan: Plan, samples: Samples, step: int, stop: int) -> None:
        """Nothing is made ahead."""

    def load(self, turn: Turn, samples: Samples) -> Mapping[int, Documents]:
        given = {index: Documents.of(part, samples, turn.some) for index, part in turn.micro_batches.items()}
        return given if self._written is None else self._written(turn.step, given)

    def rows(self, turn: Turn, loaded: Mapping[int, Documents]) -> tuple[FeatureRows, dict[int, str]]:
        return captured_rows(self._model, loaded, self._context)

    def whole(self, sample: TrainingSample) -> Features | Quarantined:
        (found,) = capture(self._model, [sample])
        return found

    def flow(self) -> None:
        """Everything is made when it is asked for."""

    def close(self) -> None:
        """The engine is its owner's to close."""
