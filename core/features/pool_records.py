"""A record of a pool: its tensors in a buffer, and the file that says what they are.

A buffer begins with its generation, then come the taps and the last hidden states. The file is a line of JSON and then
the ids [T] and the row sums of R rows spread over the record, first and last included, all int64.

Shape letters: T tokens of the sample, N taps, H target hidden size, R rows that are summed, U bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.core.errors import DamagedRecordError
from torchspec.core.features.checks import check_features
from torchspec.core.features.checksums import checksum, row_sums
from torchspec.core.features.pool_buffers import Buffer
from torchspec.core.interfaces.features import Features, RecordRef

FORMAT = 2
_ALIGNMENT = 64  # of each tensor; the first so many bytes of a buffer hold its generation
_SAMPLED_ROWS = 16
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def record_bytes(features: Features) -> int:
    """What a record takes of a pool's capacity, before its buffer's size is rounded up (by at most a quarter)."""
    return _ALIGNMENT + _aligned(features.taps_TNH.nbytes) + features.last_TH.nbytes


def fill(buffer: Buffer, features: Features) -> Tensor:
    """Copy a record into its buffer -> the row sums [R] of the copy. On an accelerator both are only queued."""
    buffer.memory_U[:8].view(torch.int64).fill_(buffer.generation)
    shape = (*features.taps_TNH.shape[:2], features.last_TH.shape[1])
    taps_TNH, last_TH = _views(buffer.memory_U, shape, features.last_TH.dtype)
    taps_TNH.copy_(features.taps_TNH)
    last_TH.copy_(features.last_TH)
    return _sums(replace(features, taps_TNH=taps_TNH, last_TH=last_TH))


def written(record_id: str, buffer: Buffer, features: Features, sums_R: Tensor) -> tuple[bytes, str]:
    """-> the content of the record's file, the record's checksum."""
    sums_R = sums_R.cpu()
    digest = checksum(features, sums_R)
    facts = {
        "format": FORMAT,
        "record_id": record_id,
        "nbytes": record_bytes(features),
        "buffer": buffer.number,
        "handle": buffer.handle,
        "generation": buffer.generation,
        "shape": [*features.taps_TNH.shape[:2], features.last_TH.shape[1]],
        "dtype": str(features.last_TH.dtype),
        "tap_layers": list(features.tap_layers),
        "norm_state": features.norm_state,
        "checksum": digest,
    }
    rows = torch.cat([features.input_ids_T.detach().cpu(), sums_R]).numpy().tobytes()
    return json.dumps(facts).encode() + b"\n" + rows, digest


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a record's file says."""

    buffer: int
    handle: str
    facts: dict[str, Any]
    input_ids_T: Tensor
    sums_R: Tensor

    @classmethod
    def of(cls, data: bytes) -> Record:
        line, _, rest = data.partition(b"\n")
        facts = json.loads(line)
        if facts["format"] != FORMAT:
            raise ValueError(f"it is of format {facts['format']}, this torchspec reads {FORMAT}")
        length = int(facts["shape"][0])
        if length < 1 or len(rest) != 8 * (length + min(length, _SAMPLED_ROWS)):
            raise ValueError(f"{len(rest)} bytes of ids and row sums for {length} tokens")
        numbers = torch.frombuffer(bytearray(rest), dtype=torch.int64)
        return cls(
            buffer=int(facts["buffer"]),
            handle=str(facts["handle"]),
            facts=facts,
            input_ids_T=numbers[:length],
            sums_R=numbers[length:],
        )

    def check(self, ref: RecordRef, path: Path) -> None:
        """DamagedRecordError when this is not what the reference promises."""
        length, digest = len(self.input_ids_T), self.facts["checksum"]
        if length != ref.length:
            raise DamagedRecordError(
                f"record {ref.record_id!r} in {path} has {length} tokens, its reference promises {ref.length}"
            )
        if (self.facts["record_id"], digest) != (ref.record_id, ref.checksum):
            raise DamagedRecordError(
                f"record {ref.record_id!r} in {path} is another one than its reference promises: checksum {digest}, "
                f"promised {ref.checksum or 'none'}"
            )

    def features(self, memory_U: Tensor) -> Features:
        """Views of the buffer's bytes; ValueError when it is used for another record by now."""
        generation = int(memory_U[:8].view(torch.int64).item())
        if generation != self.facts["generation"]:
            raise ValueError(f"its buffer is of generation {generation}, not {self.facts['generation']}")
        length, taps, hidden = self.facts["shape"]
        taps_TNH, last_TH = _views(memory_U, (length, taps, hidden), _DTYPES[self.facts["dtype"]])
        features = Features(
            input_ids_T=self.input_ids_T,
            taps_TNH=taps_TNH,
            last_TH=last_TH,
            tap_layers=tuple(self.facts["tap_layers"]),
            norm_state=self.facts["norm_state"],
        )
        check_features(self.facts["record_id"], features)
        return features

    def check_content(self, features: Features, path: Path) -> None:
        whole = checksum(features, self.sums_R) == self.facts["checksum"]
        if not whole or not torch.equal(_sums(features).cpu(), self.sums_R):
            raise DamagedRecordError(
                f"record {self.facts['record_id']!r} in {path} changed since it was written (checksum)"
            )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _views(memory_U: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """taps [T, N, H] and last [T, H] in a buffer; ValueError when it is too small."""
    length, taps, hidden = shape
    row = hidden * dtype.itemsize
    middle = _ALIGNMENT + length * taps * row
    start = _aligned(middle)
    if min(shape) < 0 or start + length * row > len(memory_U):
        raise ValueError(f"its buffer of {len(memory_U)} bytes is too small for {list(shape)}")
    taps_TNH = memory_U[_ALIGNMENT:middle].view(dtype).view(shape)
    last_TH = memory_U[start : start + length * row].view(dtype).view(length, hidden)
    return taps_TNH, last_TH


def _sums(features: Features) -> Tensor:
    """Row sums [R], on the features' device."""
    length = len(features.last_TH)
    count = min(length, _SAMPLED_ROWS)
    rows_R = (torch.arange(count) * (length - 1) // max(count - 1, 1)).to(features.last_TH.device)
    taps_RNH, last_RH = (each.index_select(0, rows_R) for each in (features.taps_TNH, features.last_TH))
    return row_sums(replace(features, taps_TNH=taps_RNH, last_TH=last_RH))
