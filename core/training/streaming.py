"""A feed that asks engines ahead of time: while one step is computed, the features of the next ones are made and come.

Forward passes are asked for in the order in which they will be computed, on every rank, so no rank waits for what
another has not been able to ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch

from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.engine import CaptureRequest, Rows, StreamedEngine
from torchspec.core.interfaces.features import Features, Quarantined
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.ahead import AheadFeed
from torchspec.core.training.capturing import Documents, Model, assigned
from torchspec.core.training.feed import Flow
from torchspec.core.training.meter import Meter
from torchspec.core.training.plan import Turn
from torchspec.core.training.source import WrittenAhead
from torchspec.core.training.uploading import Found
from torchspec.core.training.written import Writing

CALLS_PER_ENGINE = 2
"""One is computed while the features of another are on their way."""
TEXT_CALLS = 4
"""Of an engine that writes many texts at a time."""
TEXTS_AHEAD = 2
"""Texts are begun for so many times the features that may be asked for ahead: of a turn they are there before these."""


class StreamingFeed(AheadFeed):
    """See `Feed`. `engines` take calls from several threads and leave features in the host's memory.

    Ranks that share sequences ask for the same documents and other rows of them, each by itself. `name` is one for all
    of them, and no other run's or session's.
    """

    def __init__(
        self,
        model: Model,
        context: ParallelContext,
        engines: Sequence[StreamedEngine],
        *,
        name: str,
        budget: int,
        patience: float,
        writing: Writing | None = None,
    ) -> None:
        """`budget` and `patience` as of `AheadFeed`; the engines' own deadlines end before. With `writing` the engines
        write the answers first."""
        super().__init__(
            model,
            context,
            budget=budget,
            patience=patience,
            late="every engine's own deadline is over; its log may say more",
            threads=CALLS_PER_ENGINE * len(engines),
        )
        if writing is not None:
            self._source = WrittenAhead(
                engines,
                writing,
                context,
                tokens_ahead=TEXTS_AHEAD * budget // self._token_bytes,
                patience=patience,
                calls=1 if any(engine.serial for engine in engines) else TEXT_CALLS,
            )
        self._engines, self._name = engines, name
        self._count = 0
        self._meter = Meter(engines)

    def whole(self, sample: TrainingSample) -> Features | Quarantined:
        request = CaptureRequest(record_id="whole", input_ids=_ids(sample), images=sample.images)
        return self._capture(self._engines[0], [request])[0]

    def flow(self) -> Flow | None:
        self._meter.look()
        flow = super().flow()
        return None if flow is None else replace(flow, engines=self._meter.rates())

    def close(self) -> None:
        self._meter.close()
        super().close()

    def _ask(self, turn: Turn, documents: Documents, parts: Sequence[Sequence[Rows]]) -> Sequence[Future[Found]]:
        """The documents that a rank would have captured together in its own process stay together: so they come out
        the same."""
        ranks = self._context.sequence_size
        owners = assigned(documents.samples, ranks)
        groups = []
        for rank in range(ranks):
            numbers = [number for number, owner in enumerate(owners) if owner == rank]
            if not numbers:
                continue  # it takes no engine's turn: with fewer documents than ranks some engines would get none
            place = self._count * self._context.data_size + self._context.data_rank
            engine = self._engines[place % len(self._engines)]
            self._count += 1
            requests = {number: self._request(turn, number, documents, parts[number]) for number in numbers}
            groups.append(self._calls.submit(self._captured, engine, requests))
        return groups

    def _request(self, turn: Turn, number: int, documents: Documents, parts: Sequence[Rows]) -> CaptureRequest:
        """Of a document that it does not read a rank takes one row: all ask for the same ones, and so those are
        captured together whichever rank is the first to ask."""
        return CaptureRequest(
            record_id=f"{self._name}-{turn.step}-{turn.number}-{self._context.data_rank}-{number}",
            input_ids=_ids(documents.samples[number]),
            parts=() if self._sequence is None else tuple(rows or ((0, 1),) for rows in parts),
            part=self._rank,
            images=documents.samples[number].images,
        )

    def _captured(self, engine: StreamedEngine, requests: Mapping[int, CaptureRequest]) -> Found:
        return dict(zip(requests, self._capture(engine, list(requests.values())), strict=True))

    def _capture(self, engine: StreamedEngine, requests: Sequence[CaptureRequest]) -> list[Features | Quarantined]:
        store = MemoryStore()
        with torch.no_grad():
            found = engine.capture(requests, self._model.algorithm.taps, store)
        return [each if isinstance(each, Quarantined) else take(store, each) for each in found]


def _ids(sample: TrainingSample) -> list[int]:
    ids: list[int] = sample.input_ids_T.tolist()
    return ids
