"""Where the documents of the forward passes come from, for feeds that look ahead: the data, or a target that writes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from torchspec.core.interfaces.engine import Author
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.capturing import Documents, Samples, Texts
from torchspec.core.training.patience import awaited
from torchspec.core.training.plan import Plan, Turn
from torchspec.core.training.written import (
    Writing,
    answered,
    groups_of,
    texts_from_json,
    texts_to_json,
    write_texts,
)


class Source(Protocol):
    """Of one rank. Those that share sequences get the same documents."""

    def start(self, plan: Plan, samples: Samples, data_rank: int, step: int, stop: int) -> None:
        """The steps from `step` to before `stop`, of this data index."""
        ...

    def refresh(self) -> None:
        """Collective, once before each turn is used: its documents have been there for `pop` when this returns."""
        ...

    def pop(self) -> tuple[Turn, Documents] | None:
        """The next turn; None while its documents are not there yet, and after the last."""
        ...

    def close(self) -> None: ...


class Given:
    """As the data have them."""

    def __init__(self) -> None:
        self._turns: Iterator[Turn] = iter(())

    def start(self, plan: Plan, samples: Samples, data_rank: int, step: int, stop: int) -> None:
        self._samples, self._data_rank = samples, data_rank
        self._turns = plan.turns_from(step, stop)

    def refresh(self) -> None:
        """They are always there."""

    def pop(self) -> tuple[Turn, Documents] | None:
        turn = next(self._turns, None)
        if turn is None:
            return None
        return turn, Documents.of(turn.micro_batches[self._data_rank], self._samples, turn.some)

    def close(self) -> None:
        self._turns = iter(())


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A turn that is being written for."""

    turn: Turn
    prompts: Documents
    pieces: Sequence[Future[Texts]]

    @property
    def done(self) -> bool:
        return all(piece.done() for piece in self.pieces)


class WrittenAhead:
    """Answers by authors elsewhere, ahead of their use. Of ranks that share sequences the first has them written, and
    tells the others."""

    def __init__(
        self,
        authors: Sequence[Author],
        writing: Writing,
        context: ParallelContext,
        *,
        tokens_ahead: int,
        patience: float,
        calls: int,
    ) -> None:
        """Texts of at most `tokens_ahead` tokens, prompts included, are written ahead, and of at least `calls` turns an
        author. `patience`: seconds that those of one turn may be waited for."""
        self._authors, self._writing, self._context = authors, writing, context
        self._tokens_ahead, self._patience = tokens_ahead, patience
        self._least = calls * len(authors)
        self._calls = ThreadPoolExecutor(self._least, thread_name_prefix="texts")
        self._turns: Iterator[Turn] = iter(())
        self._next: Turn | None = None
        self._begun: deque[_Begun] = deque()
        self._ready: deque[tuple[Turn, Documents]] = deque()
        self._ahead: deque[int] = deque()  # tokens of each turn that was begun and is not used
        self._used = self._made = self._count = 0

    def start(self, plan: Plan, samples: Samples, data_rank: int, step: int, stop: int) -> None:
        self._lengths, self._samples, self._data_rank = plan.lengths, samples, data_rank
        self._turns = plan.turns_from(step, stop)
        self._next = next(self._turns, None)
        self._begin()

    def refresh(self) -> None:
        if self._used:
            self._ahead.popleft()
        self._used += 1
        self._begin()
        made, start = self._made, time.monotonic()
        if self._context.sequence_rank == 0:
            while self._begun and (self._begun[0].done or self._made < self._used):
                self._finish(self._begun.popleft(), start)
        if self._context.sequence_size > 1:
            self._share(self._made - made)

    def pop(self) -> tuple[Turn, Documents] | None:
        if self._context.sequence_size == 1:  # else the others would not know
            while self._begun and self._begun[0].done:
                self._finish(self._begun.popleft(), time.monotonic())
        return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        self._turns, self._next = iter(()), None
        self._begun.clear()
        self._ready.clear()
        self._calls.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        while self._next is not None:
            turn = self._next
            micro_batch = turn.micro_batches[self._data_rank]
            tokens = sum(self._lengths[index] for index in micro_batch.samples)
            if len(self._ahead) >= self._least and sum(self._ahead) + tokens > self._tokens_ahead:
                return
            self._ahead.append(tokens)
            prompts = Documents.of(micro_batch, self._samples, turn.some)
            self._begun.append(_Begun(turn=turn, prompts=prompts, pieces=self._pieces(turn, prompts)))
            self._next = next(self._turns, None)

    def _pieces(self, turn: Turn, prompts: Documents) -> list[Future[Texts]]:
        if self._context.sequence_rank:
            return []
        pieces = []
        for numbers in groups_of(prompts, self._context.sequence_size):
            if not numbers:
                continue
            place = self._count * self._context.data_size + self._context.data_rank
            author = self._authors[place % len(self._authors)]
            self._count += 1
            wanted = {number: prompts.samples[number] for number in numbers}
            pieces.append(self._calls.submit(write_texts, author, wanted, self._writing, turn.step))
        return pieces

    def _finish(self, begun: _Begun, start: float) -> None:
        what, late = f"the texts of step {begun.turn.step + 1}", "the logs of the engines may say more"
        texts = {
            number: text
            for piece in begun.pieces
            for number, text in awaited(piece, what, start, self._patience, late).items()
        }
        self._ready.append((begun.turn, answered(begun.prompts, texts)))
        self._made += 1

    def _share(self, fresh: int) -> None:
        """Of so many turns the first rank of each sequence tells the others, which have begun the same ones."""
        context = self._context
        first = context.sequence_rank == 0
        newest = list(self._ready)[len(self._ready) - fresh :]
        told = context.gather([texts_to_json(documents.texts) for _, documents in newest])
        if first:
            return
        for texts in told[context.data_rank * context.sequence_size]:
            begun = self._begun.popleft()
            self._ready.append((begun.turn, answered(begun.prompts, texts_from_json(texts))))
            self._made += 1
