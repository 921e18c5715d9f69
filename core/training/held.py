"""Samples with their features that somebody brings, held until a step trains them.

Nothing is dropped unseen: what came, what was trained and what was dropped are counted, and came = trained + dropped +
held.

Shape letters: T tokens of the sample, N taps, H target hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from torchspec.core.data.batches import MicroBatch
from torchspec.core.errors import StoreFullError
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.features import Features
from torchspec.core.parallel.ranks import Ranks
from torchspec.core.training.assembling import assembled
from torchspec.core.training.capturing import Documents, Model, Samples, stand_in
from torchspec.core.training.plan import Cut, Turn


@dataclass(frozen=True, kw_only=True)
class HeldSample:
    """`epoch` is for what is drawn of it at random, `version` counts the changes of the target before it came."""

    sample: TrainingSample
    features: Features
    epoch: int
    version: int

    @property
    def length(self) -> int:
        return self.sample.input_ids_T.numel()

    @property
    def nbytes(self) -> int:
        """Of its features."""
        return self.features.taps_TNH.nbytes + self.features.last_TH.nbytes


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What is held: samples, their tokens, bytes of their features, and how many bytes these may be."""

    samples: int
    tokens: int
    nbytes: int
    budget: int


@dataclass(kw_only=True)
class Counts:
    """Of samples, on one rank: received = trained + dropped + those that are held."""

    received: int = 0
    trained: int = 0
    dropped: int = 0


class HeldSamples:
    """A queue within a budget of bytes."""

    def __init__(self, budget: int, *, drop_oldest: bool) -> None:
        """`drop_oldest`: what does not fit takes the place of what has been held longest."""
        self.budget, self._drop_oldest = budget, drop_oldest
        self._held: deque[HeldSample] = deque()
        self._nbytes = 0
        self.counts = Counts()

    def __len__(self) -> int:
        return len(self._held)

    def check_room(self, nbytes: int) -> None:
        """StoreFullError unless a sample of so many bytes would be taken."""
        if nbytes > self.budget:
            raise StoreFullError(
                f"a sample of {nbytes} bytes of features is more than hold.budget_mb allows altogether "
                f"({self.budget} bytes): allow more, or add shorter samples"
            )
        if self._nbytes + nbytes > self.budget and not self._drop_oldest:
            raise StoreFullError(
                f"{self._nbytes} of {self.budget} bytes are held ({len(self)} samples) and a sample of {nbytes} more "
                'does not fit: call step() first, allow more (hold.budget_mb), or give hold.when_full="drop_oldest"'
            )

    def put(self, held: HeldSample) -> None:
        self.check_room(held.nbytes)
        while self._nbytes + held.nbytes > self.budget:
            self._pop()
            self.counts.dropped += 1
        self._held.append(held)
        self._nbytes += held.nbytes
        self.counts.received += 1

    def first(self, count: int) -> list[HeldSample]:
        """Those that have been held longest; they stay."""
        return list(islice(self._held, count))

    def trained(self, count: int) -> None:
        """So many of the first have been trained."""
        self._forget(count)
        self.counts.trained += count

    def dropped(self, count: int) -> None:
        """So many of the first are given up."""
        self._forget(count)
        self.counts.dropped += count

    def restore(self, held: Sequence[HeldSample], counts: Counts) -> None:
        """As it was when these were held."""
        self._held = deque(held)
        self._nbytes = sum(each.nbytes for each in held)
        self.counts = counts

    @property
    def pending(self) -> Pending:
        tokens = sum(each.length for each in self._held)
        return Pending(samples=len(self), tokens=tokens, nbytes=self._nbytes, budget=self.budget)

    def _forget(self, count: int) -> None:
        for _ in range(count):
            self._pop()

    def _pop(self) -> None:
        self._nbytes -= self._held.popleft().nbytes


def window_shares(
    lengths: Sequence[Sequence[int]], *, samples: int | None, tokens: int | None, partial: bool
) -> list[int] | None:
    """How many of the samples that each rank holds, of these lengths and oldest first, make the next window.

    The ranks' samples are taken in turns, until the window has so many `samples`, or at least so many `tokens`. None:
    not enough are held, and `partial` windows are not wanted, or nothing is held.
    """
    taken, length = [0] * len(lengths), 0
    for place in range(max(map(len, lengths), default=0)):
        for rank, held in enumerate(lengths):
            if place < len(held):
                taken[rank] += 1
                length += held[place]
                if length >= tokens if tokens is not None else sum(taken) == samples:
                    return taken
    return taken if partial and any(taken) else None


def window_turns(lengths: Sequence[Sequence[int]], rank: int, cut: Cut, step: int) -> list[Turn]:
    """The forward passes of one rank over its samples; `lengths` are those of each rank's, and all run as many.

    Samples are numbered within the rank; the number behind the last stands for a rank that has none (`Window`).
    """
    parts = [cut.micro_batches(range(len(mine)), mine, 0, 1) if mine else [] for mine in lengths]
    hole = MicroBatch(samples=(), packs=())
    return [
        Turn(
            step=step,
            number=number,
            micro_batches={rank: parts[rank][number] if number < len(parts[rank]) else hole},
            some=len(lengths[rank]),
        )
        for number in range(max(map(len, parts)))
    ]


class Window:
    """The samples of one rank's window, as a dataset and where its forward passes get their features."""

    def __init__(self, model: Model, ranks: Ranks, held: Sequence[HeldSample]) -> None:
        self._model, self._ranks, self._held = model, ranks, held

    @property
    def lengths(self) -> list[int]:
        return [each.length for each in self._held]

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> TrainingSample:
        return self._held[index].sample if index < len(self) else stand_in()

    def load(self, turn: Turn, samples: Samples) -> Mapping[int, Documents]:
        """See `Passes`."""
        return {rank: Documents.of(part, samples, turn.some) for rank, part in turn.micro_batches.items()}

    def rows(self, turn: Turn, loaded: Mapping[int, Documents]) -> tuple[FeatureRows, dict[int, str]]:
        """See `Passes`."""
        documents = loaded[self._ranks.data_rank]
        taken = {number: self._held[index].features for number, index in enumerate(documents.indices)}
        return assembled(self._model, documents, taken, {}, None)
