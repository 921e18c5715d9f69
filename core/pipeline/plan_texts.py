"""The texts of a run as far as a plan knows them: samples of them, and how many tokens all have."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from torchspec.core.data.chat import Rendered, RenderedText, Renderer
from torchspec.core.data.dataset import TokenDataset
from torchspec.core.data.messages import RowError
from torchspec.core.data.report import DatasetSettings
from torchspec.core.data.rows import ChatRow, Row, TextRow, TokenRow
from torchspec.core.data.token_file import TokenData
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.pipeline.plan_rates import Range

SAMPLED = 64
"""Rows that are tokenised to know how long all of them are, where they have not been tokenised before."""
CHARACTERS = (3.0, 5.0)
"""For a token, without the tokenizer that would say: common ones need 3 to 5 of English, German and code."""
COUNTED = 2
"""Samples whose operations are counted: of the shorter half and of the longer half of the data, one of mean length."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Of the data: samples of it, how many tokens all have in one pass, and how that is known."""

    samples: Sequence[TrainingSample]
    tokens: Range
    counted: str


class RowSample:
    """Rows taken from a stream, each as likely as any other (reservoir sampling), the same ones every time."""

    def __init__(self, size: int = SAMPLED) -> None:
        self.rows: list[Row] = []
        self.seen = 0
        self._size, self._random = size, random.Random(0)

    def look(self, row: Row) -> None:
        self.seen += 1
        if len(self.rows) < self._size:
            self.rows.append(row)
        elif (place := self._random.randrange(self.seen)) < self._size:
            self.rows[place] = row


def known_texts(dataset: TokenDataset) -> Texts:
    """Of data that have been tokenised."""
    chosen = [dataset[place] for place in _evenly(len(dataset))]
    return _exactly(chosen, torch.tensor(dataset.lengths))


def cached_texts(data: TokenData, lengths: Tensor) -> Texts:
    """Of data that have been tokenised before, `lengths` int64."""
    bounds = data.offsets.tolist()
    chosen = [
        TrainingSample(
            sample_id=data.sample_ids[place],
            input_ids_T=data.input_ids[bounds[place] : bounds[place + 1]].long(),
            loss_mask_T=data.loss_mask[bounds[place] : bounds[place + 1]].bool(),
        )
        for place in _evenly(lengths.numel())
    ]
    return _exactly(chosen, lengths)


def _evenly(count: int) -> list[int]:
    return [place * count // SAMPLED for place in range(SAMPLED)] if count > SAMPLED else list(range(count))


def _exactly(samples: list[TrainingSample], lengths: Tensor) -> Texts:
    total = float(lengths.sum())
    return Texts(samples=samples, tokens=Range(low=total, high=total), counted="counted exactly")


def sampled_texts(
    found: RowSample, tokenizer: PreTrainedTokenizerBase | None, reading: DatasetSettings
) -> Texts | None:
    """Of rows that have not been tokenised; None where none of them can be used.

    Two standard errors of the mean length make the range, or what a token may have of characters.
    """
    if tokenizer is None:
        samples = [_guessed(row, reading) for row in found.rows]
        spread = (CHARACTERS[1] / CHARACTERS[0]) ** 0.5
        how = f"taken as a token for {CHARACTERS[0]:g} to {CHARACTERS[1]:g} characters, without a tokenizer"
    else:
        samples = _tokenised(found.rows, tokenizer, reading)
        how = f"{len(samples)} of {found.seen:,} rows were tokenised for this"
    if not samples:
        return None
    lengths = torch.tensor([sample.input_ids_T.numel() for sample in samples], dtype=torch.float64)
    total = float(lengths.mean()) * found.seen
    if tokenizer is None:
        return Texts(samples=samples, tokens=Range(low=total / spread, high=total * spread), counted=how)
    error = 0.0
    if len(samples) < found.seen and len(samples) > 1:
        error = 2 * float(lengths.std()) / math.sqrt(len(samples)) * found.seen
    low = max(total - error, float(lengths.min()) * found.seen)
    return Texts(samples=samples, tokens=Range(low=low, high=total + error), counted=how)


def _tokenised(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, reading: DatasetSettings
) -> list[TrainingSample]:
    renderer = Renderer(tokenizer, reading.last_turn_only)
    found = []
    for row in rows:
        try:
            prepared = renderer.prepare(row)
            made = renderer.encode([prepared])[0] if isinstance(prepared, RenderedText) else prepared
        except RowError:
            continue
        sample = _cut(row.sample_id, made, reading)
        if int(sample.loss_mask_T.sum()) >= reading.min_supervised_tokens:
            found.append(sample)
    return found


def _cut(name: str, made: Rendered, reading: DatasetSettings) -> TrainingSample:
    return TrainingSample(
        sample_id=name,
        input_ids_T=torch.from_numpy(made.input_ids[: reading.max_length]).long(),
        loss_mask_T=torch.from_numpy(made.loss_mask[: reading.max_length]).bool(),
    )


def _guessed(row: Row, reading: DatasetSettings) -> TrainingSample:
    """By its characters: what the assistant says comes last and is supervised."""
    each = math.sqrt(CHARACTERS[0] * CHARACTERS[1])
    if isinstance(row, TokenRow):
        length, taught = len(row.input_ids), sum(row.loss_mask)
    elif isinstance(row, TextRow):
        length = taught = math.ceil(len(row.text) / each)
    else:
        length, taught = (math.ceil(count / each) for count in _characters(row))
    length = min(max(length, 2), reading.max_length)
    mask_T = torch.arange(length) >= length - max(1, min(taught, length - 1))
    return TrainingSample(
        sample_id=row.sample_id, input_ids_T=torch.zeros(length, dtype=torch.int64), loss_mask_T=mask_T
    )


def _characters(row: ChatRow) -> tuple[int, int]:
    """Of all messages, and of the assistant's."""
    sizes = [(message["role"] == "assistant", len(message.get("content") or "")) for message in row.messages]
    return sum(size for _, size in sizes), sum(size for own, size in sizes if own)


def representative(samples: Sequence[TrainingSample], count: int = COUNTED) -> list[TrainingSample]:
    """Of each of `count` parts of the samples, in order of their lengths, the one nearest to the part's mean."""
    ordered = sorted(samples, key=lambda sample: sample.input_ids_T.numel())
    found = []
    for part in range(count):
        some = ordered[part * len(ordered) // count : (part + 1) * len(ordered) // count]
        if some:
            mean = sum(sample.input_ids_T.numel() for sample in some) / len(some)
            found.append(min(some, key=lambda sample: abs(sample.input_ids_T.numel() - mean)))
    return found
