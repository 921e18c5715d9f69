"""What every feed that looks ahead does: ask for coming forward passes, in order, within a budget of bytes.

What is on its way counts against the budget as what has arrived does.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.engine import Rows
from torchspec.core.interfaces.features import Features, Quarantined
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.assembling import assembled, parts_of
from torchspec.core.training.capturing import Documents, Model, Samples
from torchspec.core.training.feed import Flow
from torchspec.core.training.patience import awaited
from torchspec.core.training.plan import Plan, Turn
from torchspec.core.training.source import Given, Source
from torchspec.core.training.uploading import Found, Uploader

MOST_TURNS = 128
"""Asked for at a time, however small they are: so many keep every engine busy, and more are only more to keep."""

MARGIN_SECONDS = 60.0
"""After the deadline of what is uploaded: it names the cause."""


@dataclass(kw_only=True)
class _Asked:
    """A turn whose features are on their way, in any number of pieces."""

    turn: Turn
    documents: Documents
    nbytes: int
    pieces: Sequence[Future[Found]]
    uploaded: Future[Callable[[], Found]] | None = None


class AheadFeed(ABC):
    """Implements `Feed` but for `whole`, with `_ask` of whoever brings the features."""

    def __init__(
        self,
        model: Model,
        context: ParallelContext,
        *,
        budget: int,
        patience: float,
        late: str,
        threads: int,
    ) -> None:
        """`budget`: bytes of features that this rank may have asked for and not used. `patience`: seconds that the
        features of one turn may be waited for; `late` says then what to look at. `threads` ask."""
        self._model, self._context = model, context
        self._budget, self._patience, self._late = budget, patience, late
        self._sequence = context.sequence_group(model.exchange, model.slab)
        # A thread is bound like its rank: a store may read, and wait, on what is its current device.
        bind = context.device.runtime.bind
        self._calls = ThreadPoolExecutor(threads, "features", initializer=bind, initargs=(context.local_rank,))
        # Where the device is the host there is nothing to upload.
        apart = context.torch_device.type != "cpu"
        self._uploader = Uploader(context.device.runtime) if apart else None
        self._source: Source = Given()
        self._next: tuple[Turn, Documents] | None = None
        self._asked: deque[_Asked] = deque()
        self._samples: Samples | None = None
        embedding_VH = model.head.embedding_VH
        self._token_bytes = (len(model.algorithm.taps) + 1) * embedding_VH.shape[1] * embedding_VH.element_size()

    @abstractmethod
    def _ask(self, turn: Turn, documents: Documents, parts: Sequence[Sequence[Rows]]) -> Sequence[Future[Found]]:
        """Begin to bring the features of a turn that has documents. `parts` are each document's rows, by the rank of
        the sequence; of one rank alone the whole document is the one part."""

    def start(self, plan: Plan, samples: Samples, step: int, stop: int) -> None:
        self._samples = samples
        self._source.start(plan, samples, self._context.data_rank, step, stop)
        self._ask_ahead()

    def load(self, turn: Turn, samples: Samples) -> Mapping[int, Documents]:
        self._source.refresh()
        self._ask_ahead()
        asked = self._asked[0]
        assert (asked.turn.step, asked.turn.number) == (turn.step, turn.number), "turns are used in order"
        return {self._context.data_rank: asked.documents}

    def rows(self, turn: Turn, loaded: Mapping[int, Documents]) -> tuple[FeatureRows, dict[int, str]]:
        asked = self._asked.popleft()
        assert (asked.turn.step, asked.turn.number) == (turn.step, turn.number), "turns are used in order"
        found = self._found(asked)
        self._upload_next()
        taken = {number: each for number, each in found.items() if isinstance(each, Features)}
        holes = {number: each.reason for number, each in found.items() if isinstance(each, Quarantined)}
        made = assembled(self._model, loaded[self._context.data_rank], taken, holes, self._sequence)
        del asked, found, taken  # what this turn held is free for those to come
        self._ask_ahead()
        return made

    def flow(self) -> Flow | None:
        return Flow(held_bytes=self._held, budget_bytes=self._budget, turns_ahead=len(self._asked))

    def close(self) -> None:
        """Nothing more is asked for; what is on its way is not waited for."""
        self._next = None
        self._source.close()
        self._asked.clear()
        if self._uploader is not None:
            self._uploader.close()
        self._calls.shutdown(wait=False, cancel_futures=True)

    def _found(self, asked: _Asked) -> Found:
        if asked.uploaded is None:
            return self._brought(asked)
        start = time.monotonic()
        return awaited(asked.uploaded, _of_step(asked.turn), start, self._patience + MARGIN_SECONDS, self._late)()

    def _brought(self, asked: _Asked) -> Found:
        found: Found = {}
        start = time.monotonic()
        for piece in asked.pieces:
            brought = awaited(piece, _of_step(asked.turn), start, self._patience, self._late)
            found |= brought
        return found

    def _upload_next(self) -> None:
        """One pass ahead and no further: what is there already fills the device."""
        if self._uploader is not None and self._asked:
            coming = self._asked[0]
            coming.uploaded = self._uploader.start(lambda: self._brought(coming))

    @property
    def _rank(self) -> int:
        """Among those that share sequences."""
        return 0 if self._sequence is None else self._sequence.rank

    @property
    def _held(self) -> int:
        return sum(asked.nbytes for asked in self._asked)

    def _ask_ahead(self) -> None:
        """As far as the documents are there, the budget goes, and no further than is of use; at least one turn, however
        large it is."""
        while True:
            self._next = self._next or self._source.pop()
            if self._next is None:
                return
            turn, documents = self._next
            parts = self._parts(documents)
            nbytes = sum(stop - start for each in parts for start, stop in each[self._rank]) * self._token_bytes
            if self._asked and (self._held + nbytes > self._budget or len(self._asked) >= MOST_TURNS):
                return
            pieces = self._ask(turn, documents, parts) if documents.real else ()
            self._asked.append(_Asked(turn=turn, documents=documents, nbytes=nbytes, pieces=pieces))
            self._next = None

    def _parts(self, documents: Documents) -> Sequence[Sequence[Rows]]:
        """Of the real documents."""
        if not documents.real:
            return []
        if self._sequence is not None:
            return parts_of(documents, self._sequence, self._model.algorithm.halo)
        return [[((0, sample.input_ids_T.numel()),)] for sample in documents.samples]


def _of_step(turn: Turn) -> str:
    return f"the features of step {turn.step + 1}"
