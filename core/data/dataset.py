"""Conversations as samples to train on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from torchspec.core.data.cache import digest, entry_path, find, ingredients, locked, writable
from torchspec.core.data.chat import Rendered, Renderer
from torchspec.core.data.prompts import Prompt, load_prompts, text_prompt
from torchspec.core.data.report import DataReport, DatasetSettings, ProgressSink, Tally, UniqueIds, nothing_left
from torchspec.core.data.rows import BadRow, RowReader
from torchspec.core.data.token_file import (
    COLUMNS,
    Column,
    CorruptFileError,
    TokenData,
    in_memory,
    open_token_file,
    write_token_file,
)
from torchspec.core.data.tokenise import tokenise
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.engine import ImageReference

__all__ = [
    "DataReport",
    "DatasetSettings",
    "Prompt",
    "TokenDataset",
    "load_dataset",
    "load_prompts",
    "planned_lengths",
]

logger = logging.getLogger(__name__)


class TokenDataset(Dataset[TrainingSample]):
    """Tokenised samples in the order of the files, read from the cache when asked for.

    lengths          tokens of each sample; of a prompt, with its answer as long as it may become
    own_lengths      tokens of each sample as it is here
    report           what became of the rows
    token_counts_V   int64, how often each id is supervised, for choosing a draft vocabulary
    ingredients      everything the data depends on, as JSON
    fingerprint      its hex digest; equal digests mean equal samples
    """

    def __init__(
        self, data: TokenData, files: tuple[Path, ...], ingredients: dict[str, Any], settings: DatasetSettings
    ) -> None:
        self._data = data
        self._bounds: list[int] = data.offsets.tolist()
        self._image_bounds: list[int] = data.image_offsets.tolist()
        self.lengths: list[int] = planned_lengths(data.offsets, settings).tolist()
        self.own_lengths: list[int] = data.offsets.diff().tolist()
        self.report = DataReport.from_json(data.facts, files)
        self.token_counts_V: Tensor = data.token_counts_V
        self.ingredients = ingredients
        self.fingerprint = digest(ingredients)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TrainingSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = slice(self._bounds[index], self._bounds[index + 1])
        return TrainingSample(
            sample_id=self._data.sample_ids[index],
            input_ids_T=self._data.input_ids[part].long(),
            loss_mask_T=self._data.loss_mask[part].bool(),
            images=self._images(index),
        )

    @property
    def with_images(self) -> str | None:
        """The first sample that has images, by its name; None where none has."""
        if not self._image_bounds[-1]:
            return None
        return self._data.sample_ids[next(n for n, end in enumerate(self._image_bounds[1:]) if end)]

    def _images(self, index: int) -> tuple[ImageReference, ...]:
        part = slice(self._image_bounds[index], self._image_bounds[index + 1])
        if part.start == part.stop:
            return ()
        return tuple(ImageReference(**each) for each in json.loads(self._data.images[part].numpy().tobytes()))


def planned_lengths(offsets: Tensor, settings: DatasetSettings) -> Tensor:
    """int64, of each sample, from where they begin and end."""
    lengths: Tensor = offsets.diff()
    return (
        lengths if settings.answer_tokens is None else (lengths + settings.answer_tokens).clamp_max(settings.max_length)
    )


def load_dataset(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    settings: DatasetSettings,
    progress: ProgressSink | None = None,
) -> TokenDataset:
    """Tokenise the rows of `files`, or find them tokenised in the cache.

    Rows that cannot be used are counted and reported (`TokenDataset.report`). Raises DataError for files that
    cannot be read at all and when no row is left; TargetError when conversations meet a tokenizer without template.
    `progress` is told bytes, several times a second.
    """
    reader = RowReader(files)
    before = _state(reader.files)
    facts_of_data = ingredients(reader.files, tokenizer, settings, progress)
    path = entry_path(settings, digest(facts_of_data))
    data = find(path, progress)
    if data is None and writable(path.parent):
        with locked(path, progress):
            # Whoever held the lock before has probably done the work.
            data = find(path, progress) if path.exists() else None
            if data is None:
                with ExitStack() as stack:
                    columns = _columns(stack, path.parent)
                    facts = _fill(columns, reader, tokenizer, settings, progress)
                    data = _publish(path, columns, facts, changed=_state(reader.files) != before)
    elif data is None:
        columns = {column: Column(letters, None) for column, letters in COLUMNS.items()}
        facts = _fill(columns, reader, tokenizer, settings, progress)
        data = in_memory(columns, facts)
    dataset = TokenDataset(data, reader.files, facts_of_data, settings)
    if dataset.report.bad_count or dataset.report.filtered:
        logger.warning("%s", dataset.report.describe())
    return dataset


def _fill(
    columns: Mapping[str, Column],
    reader: RowReader,
    tokenizer: PreTrainedTokenizerBase,
    settings: DatasetSettings,
    progress: ProgressSink | None,
) -> dict[str, Any]:
    """Tokenise everything into the columns; the report as JSON, or DataError when no sample is left."""
    renderer = Renderer(tokenizer, settings.last_turn_only)
    tally, unique, sample_ids, lengths, image_lengths = Tally(), UniqueIds(), [], [], []
    counts_V = np.zeros(renderer.id_limit, dtype=np.int64)
    prompts = settings.answer_tokens is not None
    usable = bytearray()  # of every row
    prepare = partial(text_prompt, renderer) if prompts else renderer.prepare
    for outcome in tokenise(reader, renderer, prepare, progress):
        usable.append(False)
        if isinstance(outcome, BadRow):
            tally.refuse(outcome)
            continue
        row, whole = outcome
        sample = whole if prompts else _cut(whole, settings)
        if not _usable(sample, settings):
            tally.filtered += 1
            continue
        usable[-1] = True
        tally.keep(sample)
        tally.truncated += whole.input_ids.size > settings.max_length
        columns["input_ids"].append(sample.input_ids)
        columns["loss_mask"].append(sample.loss_mask)
        np.add.at(counts_V, sample.input_ids[sample.loss_mask], 1)
        images = json.dumps([asdict(image) for image in sample.images]).encode() if sample.images else b""
        columns["images"].append(np.frombuffer(images, dtype=np.uint8))
        image_lengths.append(len(images))
        sample_ids.append(unique(row.sample_id))
        lengths.append(sample.input_ids.size)
    report = tally.report()
    if not sample_ids:
        least, most = settings.min_supervised_tokens, settings.max_length
        few = (
            f"with fewer than {least} supervised tokens, those of an assistant turn, among the first {most} "
            "(data.min_supervised_tokens, data.max_length)"
        )
        room = f"without room for an answer in {most} tokens (data.max_length)"
        raise nothing_left(report, reader.files, room if prompts else few)
    if prompts:
        _count_answers(counts_V, RowReader(reader.files), renderer, settings, usable)
    columns["offsets"].append(np.cumsum([0, *lengths]))
    columns["image_offsets"].append(np.cumsum([0, *image_lengths]))
    columns["token_counts"].append(counts_V)
    columns["sample_ids"].append(np.frombuffer(json.dumps(sample_ids).encode(), dtype=np.uint8))
    return report.to_json(reader.files)


def _cut(whole: Rendered, settings: DatasetSettings) -> Rendered:
    first = slice(settings.max_length)
    return replace(whole, input_ids=whole.input_ids[first], loss_mask=whole.loss_mask[first])


def _usable(sample: Rendered, settings: DatasetSettings) -> bool:
    """Enough of it is supervised; of a prompt, enough can be. A prompt is never cut: it would ask something else. Nor
    is an image, of which the target takes all or nothing."""
    if sample.image_end > settings.max_length:
        return False
    if settings.answer_tokens is None:
        return bool(sample.loss_mask.sum() >= settings.min_supervised_tokens)
    return sample.input_ids.size + settings.min_supervised_tokens <= settings.max_length


def _count_answers(
    counts_V: npt.NDArray[np.int64],
    reader: RowReader,
    renderer: Renderer,
    settings: DatasetSettings,
    usable: Sequence[int],
) -> None:
    """How often each id is in the answers that usable rows do hold: the best that is known of those to come."""
    for outcome, used in zip(tokenise(reader, renderer, renderer.prepare, None), usable, strict=True):
        if used and not isinstance(outcome, BadRow):
            sample = _cut(outcome[1], settings)
            np.add.at(counts_V, sample.input_ids[sample.loss_mask], 1)


def _columns(stack: ExitStack, directory: Path) -> dict[str, Column]:
    """Columns in nameless files of the cache directory, which vanish with the process whatever happens to it."""
    columns = {}
    for name, letters in COLUMNS.items():
        descriptor = None
        with suppress(OSError):  # the column is kept in memory then, and writing the entry will tell
            file = stack.enter_context(TemporaryFile(dir=directory))  # noqa: SIM115
            descriptor = file.fileno()
        columns[name] = Column(letters, descriptor)
    return columns


def _publish(path: Path, columns: Mapping[str, Column], facts: dict[str, Any], *, changed: bool) -> TokenData:
    """The data as the cache holds it, or in memory when it cannot be kept there."""
    if changed:
        logger.warning("a data file was changed while it was read: what was read is used, but not cached")
        return in_memory(columns, facts)
    try:
        write_token_file(path, columns, facts)
        return open_token_file(path)
    except (OSError, CorruptFileError) as error:
        logger.warning("tokenised data is kept in memory, writing %s failed: %s", path, error)
        return in_memory(columns, facts)


def _state(files: Sequence[Path]) -> list[tuple[int, int]]:
    stats = [file.stat() for file in files]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]
