"""Token rows for training the embedded target: three streams of text, and whole conversations packed.

Shape letters: R rows of a batch, T tokens of a row. ``ids_RT`` are inputs and ``labels_RT`` the token that
follows each, -100 where it does not count. The state of every stream is a few integers, so a resumed run
continues with the rows that the interrupted one would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from torchspec.core.data.stdlib_corpus import Conversation, Split, iter_conversations
from torchspec.core.data.stdlib_files import iter_files

IGNORED = -100
_OPEN_ROWS = 24  # rows that packing keeps open: enough to leave 1-3 % of padding


@dataclass(frozen=True, kw_only=True)
class Document:
    """Token ids of one text, and where each counts in an assistant-only loss."""

    ids: np.ndarray  # int32 [tokens]
    counts: np.ndarray  # bool [tokens]


def conversation_document(tokenizer: Any, conversation: Conversation) -> Document:
    """The rendered conversation; ``counts`` holds on the template's generation spans."""
    rendered = tokenizer.apply_chat_template(conversation.messages, return_dict=True, return_assistant_tokens_mask=True)
    return Document(
        ids=np.asarray(rendered["input_ids"], dtype=np.int32),
        counts=np.asarray(rendered["assistant_masks"], dtype=bool),
    )


def conversation_documents(tokenizer: Any, split: Split) -> list[Document]:
    """All conversations of a split, rendered."""
    return [conversation_document(tokenizer, item) for item in iter_conversations(split)]


def source_documents(tokenizer: Any, split: Split, *, tests: bool) -> list[Document]:
    """Raw files of a split, each closed by the padding token: library code, or the test suite."""
    files = [file for file in iter_files(split) if file.is_test == tests]
    encoded = tokenizer([file.text for file in files], verbose=False)["input_ids"]
    arrays = [np.asarray([*ids, tokenizer.pad_token_id], dtype=np.int32) for ids in encoded]
    return [Document(ids=ids, counts=np.ones(len(ids), dtype=bool)) for ids in arrays]


@dataclass(kw_only=True)
class Stream:
    """Documents in a new order every epoch, concatenated and cut into rows: every token counts."""

    documents: list[Document]
    length: int
    seed: int
    epoch: int = 0
    position: int = 0
    _flat: np.ndarray | None = field(default=None, repr=False)

    def state(self) -> dict[str, int]:
        """What :meth:`restore` needs."""
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from ``state``."""
        self.epoch, self.position, self._flat = state["epoch"], state["position"], None

    def row(self) -> tuple[np.ndarray, np.ndarray]:
        """The next (ids, labels), int32 [T] each."""
        if self._flat is not None and self.position + self.length + 1 > len(self._flat):
            self.epoch, self.position, self._flat = self.epoch + 1, 0, None
        if self._flat is None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.documents))
            self._flat = np.concatenate([self.documents[i].ids for i in order])
        row = self._flat[self.position : self.position + self.length + 1]
        self.position += self.length
        return row[:-1], row[1:]


@dataclass(kw_only=True)
class Packed:
    """Whole documents packed into rows, in a new order every epoch: only ``counts`` tokens count.

    A document longer than a row loses its end.
    """

    documents: list[Document]
    length: int
    seed: int
    pad: int
    epoch: int = 0
    position: int = 0
    _rows: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list, repr=False)

    def state(self) -> dict[str, int]:
        """What :meth:`restore` needs."""
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from ``state``."""
        self.epoch, self.position, self._rows = state["epoch"], state["position"], []

    def row(self) -> tuple[np.ndarray, np.ndarray]:
        """The next (ids, labels), int32 [T] each."""
        if self._rows and self.position >= len(self._rows):
            self.epoch, self.position, self._rows = self.epoch + 1, 0, []
        if not self._rows:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.documents))
            self._rows = [self._join(group) for group in self._groups(order)]
        row = self._rows[self.position]
        self.position += 1
        return row

    def rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """All rows of one pass in the given order of the documents."""
        return [self._join(group) for group in self._groups(np.arange(len(self.documents)))]

    def _groups(self, order: np.ndarray) -> list[list[Document]]:
        """First fit over a few open rows of ``length + 1`` tokens."""
        closed: list[list[Document]] = []
        opened: list[tuple[int, list[Document]]] = []
        for index in order:
            document = self.documents[index]
            size = min(len(document.ids), self.length + 1)
            for slot, (used, group) in enumerate(opened):
                if used + size <= self.length + 1:
                    opened[slot] = (used + size, [*group, document])
                    break
            else:
                opened.append((size, [document]))
            if len(opened) > _OPEN_ROWS:
                fullest = max(range(len(opened)), key=lambda slot: opened[slot][0])
                closed.append(opened.pop(fullest)[1])
        return closed + [group for _, group in opened]

    def _join(self, group: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full(self.length + 1, self.pad, dtype=np.int32)
        labels = np.full(self.length + 1, IGNORED, dtype=np.int32)
        start = 0
        for document in group:
            stop = min(start + len(document.ids), self.length + 1)
            ids[start:stop] = document.ids[: stop - start]
            counts = document.counts[: stop - start]
            labels[start:stop][counts] = ids[start:stop][counts]
            start = stop
        return ids[:-1], labels[1:]


def batch(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``ids_RT`` and ``labels_RT``, int64, of the rows."""
    ids_RT = torch.from_numpy(np.stack([ids for ids, _ in rows])).long()
    labels_RT = torch.from_numpy(np.stack([labels for _, labels in rows])).long()
    return ids_RT, labels_RT
