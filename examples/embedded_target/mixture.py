"""Token rows for training the embedded target: text cut into rows, and whole conversations packed.

Shape letters: R rows of a batch, T tokens of a row. ``ids_RT`` are inputs and ``labels_RT`` the token that
follows each, -100 where it does not count. The state of a source of rows is two integers, so a resumed run
continues with the rows that the interrupted one would have seen.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from torchspec.core.data.stdlib_corpus import Conversation, Split, iter_conversations
from torchspec.core.data.stdlib_files import iter_files

IGNORED = -100


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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of ``T`` inputs and the tokens that follow them."""

    ids: np.ndarray  # int32 [T + 1]
    counts: np.ndarray  # bool [T + 1]: tokens of an answer
    real: np.ndarray  # bool [T + 1]: tokens that are not padding


@dataclass(kw_only=True)
class Rows:
    """An endless source of rows of one length, in a new order every epoch; the base of the two kinds."""

    length: int  # T
    seed: int
    epoch: int = 0
    position: int = 0
    _made: list[Row] = field(default_factory=list, repr=False)

    def state(self) -> dict[str, int]:
        """What :meth:`restore` needs."""
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from ``state``."""
        self.epoch, self.position, self._made = state["epoch"], state["position"], []

    def row(self) -> Row:
        """The next row."""
        if self._made and self.position >= len(self._made):
            self.epoch, self.position, self._made = self.epoch + 1, 0, []
        if not self._made:
            self._made = self.make(np.random.default_rng([self.seed, self.epoch]))
        row = self._made[self.position]
        self.position += 1
        return row

    def make(self, generator: np.random.Generator) -> list[Row]:
        """The rows of one epoch."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Cut(Rows):
    """Documents one after the other, cut every ``length`` tokens; the last part row is lost."""

    documents: list[Document]

    def make(self, generator: np.random.Generator) -> list[Row]:
        """The documents in random order, cut."""
        order = generator.permutation(len(self.documents))
        ids = np.concatenate([self.documents[i].ids for i in order])
        counts = np.concatenate([self.documents[i].counts for i in order])
        starts = range(0, len(ids) - self.length, self.length)
        parts = [slice(start, start + self.length + 1) for start in starts]
        real = np.ones(self.length + 1, dtype=bool)
        return [Row(ids=ids[part], counts=counts[part], real=real) for part in parts]


@dataclass(kw_only=True)
class Packed(Rows):
    """Rows of whole documents from :func:`pack`; what shares a row does so in every epoch."""

    rows: list[Row]

    def make(self, generator: np.random.Generator) -> list[Row]:
        """The rows in random order."""
        return [self.rows[i] for i in generator.permutation(len(self.rows))]


def pack(documents: list[Document], lengths: tuple[int, ...], *, pad: int) -> dict[int, list[Row]]:
    """Whole documents in rows of the given lengths (ascending); the longest documents lose their ends.

    A document opens a row of the shortest length that holds it, unless a row that a longer one opened has
    room: attention costs the square of a row, so short documents do not belong into long rows otherwise.
    """
    groups: list[tuple[int, list[Document]]] = []
    room: list[tuple[int, int]] = []  # a heap of (- free tokens, index of the group)
    for length, shorter in zip(reversed(lengths), (*reversed(lengths[:-1]), -1), strict=True):
        longest = 1 << 30 if length == lengths[-1] else length + 1
        for document in documents:
            size = min(len(document.ids), length + 1)
            if not shorter + 1 < len(document.ids) <= longest:
                continue
            if room and -room[0][0] >= size:
                free, index = heapq.heappop(room)
                groups[index][1].append(document)
                heapq.heappush(room, (free + size, index))
            else:
                groups.append((length, [document]))
                heapq.heappush(room, (size - length - 1, len(groups) - 1))
    rows: dict[int, list[Row]] = {length: [] for length in lengths}
    for length, group in groups:
        rows[length].append(_join(group, length, pad))
    return rows


def _join(group: list[Document], length: int, pad: int) -> Row:
    ids = np.concatenate([document.ids for document in group])[: length + 1]
    counts = np.concatenate([document.counts for document in group])[: length + 1]
    missing = (0, length + 1 - len(ids))
    return Row(
        ids=np.pad(ids, missing, constant_values=pad),
        counts=np.pad(counts, missing),
        real=np.pad(np.ones(len(ids), dtype=bool), missing),
    )


def batch(rows: list[Row], *, answers_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``ids_RT`` and ``labels_RT``, int64, of the rows."""
    ids = np.stack([row.ids for row in rows]).astype(np.int64)
    counts = np.stack([row.counts if answers_only else row.real for row in rows])
    labels = np.where(counts, ids, IGNORED)
    return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(labels[:, 1:].copy())
