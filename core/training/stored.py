"""A feed that reads captured features from a directory: while one step is computed, those of the next ones are read.

The records stay. Ranks that share sequences each read their own rows of the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from torchspec.core.errors import DamagedRecordError, MissingRecordError
from torchspec.core.features.manifest import Manifest, record_name
from torchspec.core.features.stored_rows import read_rows
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.engine import Rows
from torchspec.core.interfaces.features import Features, Quarantined
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.ahead import AheadFeed
from torchspec.core.training.capturing import Documents, Model, Samples
from torchspec.core.training.plan import Plan, Turn
from torchspec.core.training.uploading import Found

READERS = 4
"""Reading waits for the disk, and checking is as fast as memory: so few keep ahead of any step."""
PATIENCE = 600.0
"""Seconds in which the disk must have brought the records of one forward pass."""


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


class StoredFeed(AheadFeed):
    """See `Feed`."""

    def __init__(self, model: Model, context: ParallelContext, features: StoredFeatures) -> None:
        super().__init__(
            model,
            context,
            budget=features.budget,
            patience=PATIENCE,
            late=f"is the disk of {features.directory} there?",
            threads=READERS,
        )
        self._features = features

    def start(self, plan: Plan, samples: Samples, step: int, stop: int) -> None:
        assert len(samples) == len(self._features.manifest.checksums), "the features are of other data"
        super().start(plan, samples, step, stop)

    def whole(self, sample: TrainingSample) -> Features | Quarantined:
        """Before `start`, of the first sample of the data alone; a record of other tokens is not given out."""
        samples: Sequence[TrainingSample] | Samples = [sample] if self._samples is None else self._samples
        for index in range(len(samples)):
            if samples[index].sample_id == sample.sample_id:
                return self._features.read(index, sample)
        return Quarantined(record_id=sample.sample_id, reason=f"not in {self._features.directory}")

    def _ask(self, turn: Turn, documents: Documents, parts: Sequence[Sequence[Rows]]) -> Sequence[Future[Found]]:
        """Documents of which it reads no row are not read."""
        wanted = {number: each[self._rank] for number, each in enumerate(parts) if each[self._rank]}
        return [self._calls.submit(self._read, documents, number, rows) for number, rows in wanted.items()]

    def _read(self, documents: Documents, number: int, rows: Rows) -> Found:
        return {number: self._features.read(documents.indices[number], documents.samples[number], rows)}
