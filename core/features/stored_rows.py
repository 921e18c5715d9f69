"""Rows of a record in a directory store, checked without reading the others.

The record's checksum is of its ids and of all rows' sums, which are stored beside the rows: so a reader of a part knows
that these are the record's, and of the hidden states it needs its own rows alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from torchspec.core.errors import DamagedRecordError, MissingRecordError
from torchspec.core.features.checks import check_features
from torchspec.core.features.checksums import checksum, row_sums
from torchspec.core.features.directory import FORMAT, SUFFIX
from torchspec.core.features.parts import part_of
from torchspec.core.interfaces.features import Features

_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError)


def read_rows(directory: Path, record: str, promised: str, rows: Sequence[tuple[int, int]] = ()) -> Features:
    """The rows [start, stop) of each pair, of a record with a plain name and this checksum; () are all of them.

    What is one piece is mapped from the file and must not be written. Raises MissingRecordError, and DamagedRecordError
    when the record is not the promised one or these rows are not what was written.
    """
    path = directory / (record + SUFFIX)
    try:
        path.stat()  # safetensors has errors of its own for a missing file
        whole, sums_T = _mapped(path)
        check_features(record, whole)
    except FileNotFoundError:
        raise MissingRecordError(f"record {record} is not in {directory}") from None
    except _UNREADABLE as error:
        raise DamagedRecordError(f"record {record} in {path} cannot be read: {error}") from error
    length = len(whole.input_ids_T)
    if sums_T.dtype != torch.int64 or sums_T.shape != (length,) or checksum(whole, sums_T) != promised:
        raise DamagedRecordError(f"record {record} in {path} is not the one of this checksum: {promised}")
    pieces = list(rows) or [(0, length)]
    part = part_of(whole, pieces)
    if not torch.equal(row_sums(part), torch.cat([sums_T[start:stop] for start, stop in pieces])):
        raise DamagedRecordError(f"record {record} in {path} changed since it was written (sums of its rows)")
    return part


def _mapped(path: Path) -> tuple[Features, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {})["torchspec"])
        if facts["format"] != FORMAT:
            raise ValueError(f"it is of format {facts['format']}, this torchspec reads {FORMAT}")
        features = Features(
            input_ids_T=file.get_tensor("input_ids"),
            taps_TNH=file.get_tensor("taps"),
            last_TH=file.get_tensor("last"),
            tap_layers=tuple(facts["tap_layers"]),
            norm_state=facts["norm_state"],
        )
        return features, file.get_tensor("row_sums")
