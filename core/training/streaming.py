"""A feed that asks engines ahead of time: while one step is computed, the features of the next ones are made and come.

Forward passes are asked for in the order in which they will be computed, on every rank, so no rank waits for what
another has not been able to ask for. What is on its way counts against the budget of bytes as what has arrived does.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass

import torch

from torchspec.core.errors import TargetError
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.engine import CaptureRequest, Rows, StreamedEngine
from torchspec.core.interfaces.features import Features, Quarantined
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.assembling import assembled, parts_of
from torchspec.core.training.capturing import Documents, Model, Samples, assigned
from torchspec.core.training.feed import Flow
from torchspec.core.training.meter import Meter
from torchspec.core.training.plan import Plan, Turn

logger = logging.getLogger(__name__)

FIRST_WORD, BETWEEN_WORDS = 15.0, 30.0
CALLS_PER_ENGINE = 2
"""One is computed while the features of another are on their way."""

Found = dict[int, Features | Quarantined]
"""Of a document's number."""


@dataclass(kw_only=True)
class _Asked:
    """A turn whose features are on their way. `groups` are what is captured together."""

    turn: Turn
    nbytes: int
    groups: list[Future[Found]]


class StreamingFeed:
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
    ) -> None:
        """`budget`: bytes of features that this rank may have asked for and not used. `patience`: seconds that one
        turn may be waited for; the engines' own deadlines end before."""
        self._model, self._context, self._engines = model, context, engines
        self._name, self._budget, self._patience = name, budget, patience
        self._sequence = context.sequence_group(model.exchange)
        self._calls = ThreadPoolExecutor(CALLS_PER_ENGINE * len(engines), thread_name_prefix="features")
        self._coming: Iterator[Turn] = iter(())
        self._next: Turn | None = None
        self._asked: deque[_Asked] = deque()
        self._count = 0
        self._meter = Meter(engines)
        self._samples: Samples | None = None
        embedding_VH = model.head.embedding_VH
        values = (len(model.algorithm.taps) + 1) * embedding_VH.shape[1]
        self._token_bytes = values * embedding_VH.element_size()

    def start(self, plan: Plan, samples: Samples, step: int, stop: int) -> None:
        self._samples = samples
        self._coming = plan.turns_from(step, stop)
        self._next = next(self._coming, None)
        self._ask_ahead()

    def rows(self, turn: Turn, loaded: Mapping[int, Documents]) -> tuple[FeatureRows, dict[int, str]]:
        asked = self._asked.popleft()
        assert (asked.turn.step, asked.turn.number) == (turn.step, turn.number), "turns are used in order"
        found: Found = {}
        for group in asked.groups:
            found |= self._awaited(group, turn)
        taken = {number: each for number, each in found.items() if isinstance(each, Features)}
        holes = {number: each.reason for number, each in found.items() if isinstance(each, Quarantined)}
        documents = loaded[self._context.data_rank]
        made = assembled(self._model, documents, taken, holes, self._sequence)
        del asked, found, taken  # what this turn held is free for those to come
        self._ask_ahead()
        return made

    def whole(self, sample: TrainingSample) -> Features | Quarantined:
        return self._capture(self._engines[0], [CaptureRequest(record_id="whole", input_ids=_ids(sample))])[0]

    def flow(self) -> Flow | None:
        self._meter.look()
        return Flow(
            held_bytes=self._held,
            budget_bytes=self._budget,
            turns_ahead=len(self._asked),
            engines=self._meter.rates(),
        )

    def close(self) -> None:
        """Nothing more is asked for; what is on its way is not waited for."""
        self._coming, self._next = iter(()), None
        self._asked.clear()
        self._meter.close()
        self._calls.shutdown(wait=False, cancel_futures=True)

    @property
    def _held(self) -> int:
        return sum(asked.nbytes for asked in self._asked)

    def _ask_ahead(self) -> None:
        """As far as the budget goes; at least one turn, however large it is."""
        while self._next is not None:
            documents = self._documents(self._next)
            parts = self._parts(documents)
            nbytes = sum(map(self._nbytes, documents.real, parts))
            if self._asked and self._held + nbytes > self._budget:
                return
            self._asked.append(_Asked(turn=self._next, nbytes=nbytes, groups=self._ask(self._next, documents, parts)))
            self._next = next(self._coming, None)

    def _documents(self, turn: Turn) -> Documents:
        assert self._samples is not None
        return Documents.of(turn.micro_batches[self._context.data_rank], self._samples, turn.some)

    def _parts(self, documents: Documents) -> list[tuple[Rows, ...]]:
        """Rows by rank; () where nobody shares.

        Of a document that it does not read a rank takes one row: all ask for the same ones, and so those are captured
        together whichever rank is the first to ask.
        """
        if self._sequence is None:
            return [()] * len(documents.samples)
        read = parts_of(documents, self._sequence, self._model.algorithm.halo)
        return [tuple(rows or ((0, 1),) for rows in each) for each in read]

    def _nbytes(self, sample: TrainingSample, parts: Sequence[Rows]) -> int:
        if not parts:
            return sample.input_ids_T.numel() * self._token_bytes
        assert self._sequence is not None
        return sum(stop - start for start, stop in parts[self._sequence.rank]) * self._token_bytes

    def _ask(self, turn: Turn, documents: Documents, parts: Sequence[tuple[Rows, ...]]) -> list[Future[Found]]:
        """The documents that a rank would have captured together in its own process stay together: so they come out
        the same."""
        if not documents.real:
            return []
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

    def _request(self, turn: Turn, number: int, documents: Documents, parts: tuple[Rows, ...]) -> CaptureRequest:
        return CaptureRequest(
            record_id=f"{self._name}-{turn.step}-{turn.number}-{self._context.data_rank}-{number}",
            input_ids=_ids(documents.samples[number]),
            parts=parts,
            part=0 if self._sequence is None else self._sequence.rank,
        )

    def _captured(self, engine: StreamedEngine, requests: Mapping[int, CaptureRequest]) -> Found:
        return dict(zip(requests, self._capture(engine, list(requests.values())), strict=True))

    def _capture(self, engine: StreamedEngine, requests: Sequence[CaptureRequest]) -> list[Features | Quarantined]:
        store = MemoryStore()
        with torch.no_grad():
            found = engine.capture(requests, self._model.algorithm.taps, store)
        return [each if isinstance(each, Quarantined) else take(store, each) for each in found]

    def _awaited(self, group: Future[Found], turn: Turn) -> Found:
        start, pause = time.monotonic(), FIRST_WORD
        while True:
            try:
                return group.result(timeout=pause)
            except NotYet:
                if group.done():
                    raise  # of the capture itself
                passed = time.monotonic() - start
                if passed > self._patience:
                    raise TargetError(
                        f"the features of step {turn.step + 1} did not come within {passed:.0f} s, and every engine's "
                        "own deadline is over: its log may say more"
                    ) from None
                logger.info(
                    "waiting for the features of step %d, %.0f s of at most %.0f s",
                    turn.step + 1, passed, self._patience,
                )  # fmt: skip
                pause = BETWEEN_WORDS


def _ids(sample: TrainingSample) -> list[int]:
    ids: list[int] = sample.input_ids_T.tolist()
    return ids
