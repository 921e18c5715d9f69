"""A record of a pool: its tensors in a buffer, and the file that says what they are.

A buffer begins with its generation, then come the taps and the last hidden states. The file is a line of JSON and then
the ids and the row sums, both int64 [T].

Shape letters: T tokens of the sample, N taps, H target hidden size, R rows that are looked at, U bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchspec.core.errors import DamagedRecordError
from torchspec.core.features.checks import check_features
from torchspec.core.features.checksums import checksum, row_sums
from torchspec.core.features.pool_buffers import Buffer
from torchspec.core.interfaces.features import Features, RecordRef

FORMAT = 1
_ALIGNMENT = 64  # of each tensor; the first so many bytes of a buffer hold its generation
_CHUNK_BYTES = 1 << 19  # summed while a cache has them; fewer cost more calls than they save
_SAMPLED_ROWS = 16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def record_bytes(features: Features) -> int:
    """What a record takes of a pool's capacity, before its buffer's size is rounded up (by at most a quarter)."""
    return _ALIGNMENT + _aligned(features.taps_TNH.nbytes) + features.last_TH.nbytes


def fill(buffer: Buffer, features: Features) -> Tensor:
    """Copy a record into its buffer -> its row sums [T], on the host. On an accelerator the copy is only queued."""
    buffer.memory_U[:8].view(torch.int64).fill_(buffer.generation)
    shape = (*features.taps_TNH.shape[:2], features.last_TH.shape[1])
    return _copied(features, *_views(buffer.memory_U, shape, features.last_TH.dtype))


def written(record_id: str, buffer: Buffer, features: Features, sums_T: Tensor) -> tuple[bytes, str]:
    """-> the content of the record's file, the record's checksum."""
    digest = checksum(features, sums_T)
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
    rows = torch.stack([features.input_ids_T.detach().cpu(), sums_T]).numpy().tobytes()
    return json.dumps(facts).encode() + b"\n" + rows, digest


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a record's file says."""

    buffer: int
    handle: str
    facts: dict[str, Any]
    input_ids_T: Tensor
    sums_T: Tensor

    @classmethod
    def of(cls, data: bytes) -> Record:
        line, _, rest = data.partition(b"\n")
        facts = json.loads(line)
        if facts["format"] != FORMAT:
            raise ValueError(f"it is of format {facts['format']}, this torchspec reads {FORMAT}")
        length = int(facts["shape"][0])
        if length < 1 or len(rest) != 16 * length:
            raise ValueError(f"{len(rest)} bytes of ids and row sums for {length} tokens")
        ids_T, sums_T = torch.frombuffer(bytearray(rest), dtype=torch.int64).view(2, length)
        return cls(
            buffer=int(facts["buffer"]), handle=str(facts["handle"]), facts=facts, input_ids_T=ids_T, sums_T=sums_T
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
        length = len(self.input_ids_T)
        count = min(length, _SAMPLED_ROWS)
        rows_R = torch.arange(count) * (length - 1) // max(count - 1, 1)
        at_R = rows_R.to(features.last_TH.device)
        taps_RNH, last_RH = (each.index_select(0, at_R) for each in (features.taps_TNH, features.last_TH))
        sample = replace(features, taps_TNH=taps_RNH, last_TH=last_RH)
        if checksum(features, self.sums_T) != self.facts["checksum"] or not torch.equal(
            row_sums(sample).cpu(), self.sums_T[rows_R]
        ):
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


def _copied(features: Features, taps_TNH: Tensor, last_TH: Tensor) -> Tensor:
    """Copy into a buffer's views -> the row sums [T], on the host; a CPU adds up what its cache still has."""
    pairs = [(features.taps_TNH, taps_TNH), (features.last_TH, last_TH)]
    in_cache = features.last_TH.device.type == taps_TNH.device.type == "cpu"
    if not in_cache or any(to[0].nbytes % 8 for _, to in pairs):
        for given, to in pairs:
            to.copy_(given)
        return row_sums(features).cpu()
    sums_T, part_T = np.zeros((2, len(last_TH)), dtype=np.int64)
    for given, to in pairs:
        if not to.numel():
            continue
        whole = _INTEGERS[to.dtype.itemsize]  # numpy, whose calls cost least, has no bfloat16
        source, target = given.view(whole).numpy(), to.view(whole).numpy()
        words = to.flatten(1).view(torch.int64).numpy()
        rows = max(1, _CHUNK_BYTES // words[0].nbytes)
        for first in range(0, len(words), rows):
            piece = slice(first, first + rows)
            target[piece] = source[piece]
            np.add.reduce(words[piece], axis=1, out=part_T[piece])
        sums_T += part_T
    return torch.from_numpy(sums_T)
