"""A feed that reads captured features from a directory: while one step is computed, those of the next ones are read.

The records stay. Ranks that share sequences each read their own rows of the same files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path

import torch

from torchspec.core.errors import DamagedRecordError, FeatureStoreError, MissingRecordError
from torchspec.core.features.manifest import Manifest, record_name
from torchspec.core.features.rows import FeatureRows
from torchspec.core.features.stored_rows import read_rows
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.engine import Rows
from torchspec.core.interfaces.features import Features, Quarantined
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.assembling import assembled, parts_of
from torchspec.core.training.capturing import Documents, Model, Samples
from torchspec.core.training.feed import Flow
from torchspec.core.training.plan import Plan, Turn

READERS = 4
"""Reading waits for the disk, and checking is as fast as memory: so few keep ahead of any step."""
PATIENCE = 600.0
"""Seconds in which the disk must have brought one record."""


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """A directory of records and what its finished capture says of them. `budget`: bytes that may be read ahead."""

    directory: Path
    manifest: Manifest
    budget: int

    def feed(self, model: Model, context: ParallelContext) -> StoredFeed:
        return StoredFeed(model, context, self)

    def read(self, index: int, sample: TrainingSample, rows: Rows = ()) -> Features | Quarantined:
        """Of the sample at this place of the data, these rows, or all of them; why not, where there are none."""
        name = record_name(index)
        promised = self.manifest.checksums[index]
        if promised is None:
            return Quarantined(record_id=name, reason=f"not captured: {self.manifest.lost[index].reason}")
        try:
            features = read_rows(self.directory, name, promised, rows)
        except (MissingRecordError, DamagedRecordError) as error:
            return Quarantined(record_id=name, reason=str(error))
        ids_T = sample.input_ids_T
        if not torch.equal(features.input_ids_T, torch.cat([ids_T[a:b] for a, b in rows]) if rows else ids_T):
            return Quarantined(record_id=name, reason=f"record {name} in {self.directory} is of other tokens")
        return features


@dataclass(kw_only=True)
class _Asked:
    """A turn whose records are being read, by the number of the document."""

    turn: Turn
    nbytes: int
    records: dict[int, Future[Features | Quarantined]]


class StoredFeed:
    """See `Feed`. What is being read counts against the budget as what has been read and not used does."""

    def __init__(self, model: Model, context: ParallelContext, features: StoredFeatures) -> None:
        self._model, self._context, self._features = model, context, features
        self._sequence = context.sequence_group(model.exchange)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="features")
        self._samples: Samples | None = None
        self._coming: Iterator[Turn] = iter(())
        self._next: Turn | None = None
        self._asked: deque[_Asked] = deque()
        embedding_VH = model.head.embedding_VH
        self._token_bytes = (len(model.algorithm.taps) + 1) * embedding_VH.shape[1] * embedding_VH.element_size()

    def start(self, plan: Plan, samples: Samples, step: int, stop: int) -> None:
        assert len(samples) == len(self._features.manifest.checksums), "the features are of other data"
        self._samples = samples
        self._coming = plan.turns_from(step, stop)
        self._next = next(self._coming, None)
        self._read_ahead()

    def rows(self, turn: Turn, loaded: Mapping[int, Documents]) -> tuple[FeatureRows, dict[int, str]]:
        asked = self._asked.popleft()
        assert (asked.turn.step, asked.turn.number) == (turn.step, turn.number), "turns are used in order"
        deadline = time.monotonic() + PATIENCE
        found = {number: self._awaited(record, deadline) for number, record in asked.records.items()}
        taken = {number: each for number, each in found.items() if isinstance(each, Features)}
        holes = {number: each.reason for number, each in found.items() if isinstance(each, Quarantined)}
        made = assembled(self._model, loaded[self._context.data_rank], taken, holes, self._sequence)
        del asked, found, taken  # what this turn held is free for those to come
        self._read_ahead()
        return made

    def whole(self, sample: TrainingSample) -> Features | Quarantined:
        """Before `start`, of the first sample of the data alone; a record of other tokens is not given out."""
        samples: Sequence[TrainingSample] | Samples = [sample] if self._samples is None else self._samples
        for index in range(len(samples)):
            if samples[index].sample_id == sample.sample_id:
                return self._features.read(index, sample)
        return Quarantined(record_id=sample.sample_id, reason=f"not in {self._features.directory}")

    def flow(self) -> Flow | None:
        budget = self._features.budget
        return Flow(held_bytes=self._held, budget_bytes=budget, turns_ahead=len(self._asked))

    def close(self) -> None:
        """Nothing more is read; what is being read is not waited for."""
        self._coming, self._next = iter(()), None
        self._asked.clear()
        self._readers.shutdown(wait=False, cancel_futures=True)

    @property
    def _held(self) -> int:
        return sum(asked.nbytes for asked in self._asked)

    def _read_ahead(self) -> None:
        """As far as the budget goes; at least one turn, however large it is."""
        assert self._samples is not None
        while self._next is not None:
            turn = self._next
            documents = Documents.of(turn.micro_batches[self._context.data_rank], self._samples, turn.some)
            wanted = self._wanted(documents)
            nbytes = sum(stop - start for rows in wanted.values() for start, stop in rows) * self._token_bytes
            if self._asked and self._held + nbytes > self._features.budget:
                return
            records = {
                number: self._readers.submit(
                    self._features.read, documents.indices[number], documents.samples[number], rows
                )
                for number, rows in wanted.items()
            }
            self._asked.append(_Asked(turn=turn, nbytes=nbytes, records=records))
            self._next = next(self._coming, None)

    def _wanted(self, documents: Documents) -> dict[int, Rows]:
        """The rows that this rank reads of each document; documents of which it reads none are not there."""
        if not documents.real:
            return {}
        parts: Sequence[Rows] = [((0, sample.input_ids_T.numel()),) for sample in documents.samples]
        if self._sequence is not None:
            mine = self._sequence.rank
            parts = [each[mine] for each in parts_of(documents, self._sequence, self._model.algorithm.halo)]
        return {number: rows for number, rows in enumerate(parts) if rows}

    def _awaited(self, record: Future[Features | Quarantined], deadline: float) -> Features | Quarantined:
        try:
            return record.result(timeout=max(0.0, deadline - time.monotonic()))
        except NotYet:
            raise FeatureStoreError(
                f"{self._features.directory} did not bring a record of features in {PATIENCE:.0f} s: is its disk there?"
            ) from None
