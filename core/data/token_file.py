"""Tokenised data in one safetensors file: written as a stream, checked when opened, read lazily.

Tensors: ``input_ids`` int32 and ``loss_mask`` uint8, all samples one after another; ``offsets`` int64 [samples + 1];
``token_counts`` int64 [V]; ``sample_ids`` uint8, a JSON list as UTF-8; ``images`` uint8, of each sample with images a
JSON list as UTF-8, one after another, with ``image_offsets`` int64 [samples + 1]. The metadata hold the format's
version, a checksum of every tensor, and the caller's facts as JSON with theirs.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchspec.core.data.report import Progress, ProgressSink

FORMAT_VERSION = 2
_BLOCK = 1 << 22
_DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "U8": np.dtype("u1"), "I64": np.dtype("<i8")}
COLUMNS = {
    "input_ids": "I32",
    "loss_mask": "U8",
    "offsets": "I64",
    "token_counts": "I64",
    "sample_ids": "U8",
    "images": "U8",
    "image_offsets": "I64",
}


class CorruptFileError(ValueError):
    """A file is not what was written; says why."""


class Slices(Protocol):
    """A flat tensor of which parts are read on demand."""

    def __getitem__(self, part: slice) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """All samples; sample i is [offsets[i], offsets[i + 1]) of `input_ids` and `loss_mask`, and its images are
    described in [image_offsets[i], image_offsets[i + 1]) of `images`."""

    input_ids: Slices
    loss_mask: Slices
    offsets: Tensor
    token_counts_V: Tensor
    sample_ids: list[str]
    images: Slices
    image_offsets: Tensor
    facts: dict[str, Any]


class Column:
    """A flat array that grows at its end: in a file while that can be written, from then on in memory."""

    def __init__(self, letters: str, descriptor: int | None) -> None:
        """`letters` is safetensors' name of the dtype; `descriptor` an empty file's, None to stay in memory."""
        self.letters, self.bytes, self.crc32 = letters, 0, 0
        self._descriptor = descriptor
        self._written = 0
        self._pending: list[bytes] = []

    def __len__(self) -> int:
        return self.bytes // _DTYPES[self.letters].itemsize

    def append(self, values: npt.NDArray[Any]) -> None:
        data = values.astype(_DTYPES[self.letters], copy=False).tobytes()
        self.bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self._pending.append(data)
        if self._descriptor is not None and self.bytes - self._written >= _BLOCK:
            self._flush(self._descriptor)

    def _flush(self, descriptor: int) -> None:
        block = memoryview(b"".join(self._pending))
        at = self._written
        try:
            while block:
                count = os.pwrite(descriptor, block, at)
                block, at = block[count:], at + count
        except OSError:  # what was written before is still there
            self._pending = [*self._read_back(), *self._pending]
            self._descriptor, self._written = None, 0
        else:
            self._pending, self._written = [], at

    def _read_back(self) -> Iterator[bytes]:
        at = 0
        while self._descriptor is not None and at < self._written:
            chunk = os.pread(self._descriptor, min(_BLOCK, self._written - at), at)
            if not chunk:
                raise OSError("a temporary file of the cache was cut while it was written")
            at += len(chunk)
            yield chunk

    def chunks(self) -> Iterator[bytes]:
        """Everything appended, a part at a time."""
        yield from self._read_back()
        yield from self._pending

    def tensor(self) -> Tensor:
        """Everything appended, in memory."""
        data = bytearray().join(self.chunks())
        return torch.from_numpy(np.frombuffer(data, _DTYPES[self.letters]))


def write_token_file(path: Path, columns: Mapping[str, Column], facts: dict[str, Any]) -> None:
    """Write the tensors (`COLUMNS`) beside `path`, then move it there at once; OSError if it fails."""
    header: dict[str, Any] = {"__metadata__": _metadata(columns, facts)}
    end = 0
    for name, column in columns.items():
        start, end = end, end + column.bytes
        header[name] = {"dtype": column.letters, "shape": [len(column)], "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with aside.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for column in columns.values():
                for chunk in column.chunks():
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _metadata(columns: Mapping[str, Column], facts: dict[str, Any]) -> dict[str, str]:
    text = json.dumps(facts)
    sums = {name: column.crc32 for name, column in columns.items()}
    return {
        "format": f"torchspec tokens {FORMAT_VERSION}",
        "facts": text,
        "crc32": json.dumps({**sums, "facts": zlib.crc32(text.encode())}),
    }


def in_memory(columns: Mapping[str, Column], facts: dict[str, Any]) -> TokenData:
    """What `open_token_file` would return, had the file been written."""
    tensors = {name: column.tensor() for name, column in columns.items()}
    return TokenData(
        input_ids=tensors["input_ids"],
        loss_mask=tensors["loss_mask"],
        offsets=tensors["offsets"],
        token_counts_V=tensors["token_counts"],
        sample_ids=json.loads(tensors["sample_ids"].numpy().tobytes()),
        images=tensors["images"],
        image_offsets=tensors["image_offsets"],
        facts=facts,
    )


def open_token_file(path: Path, progress: ProgressSink | None = None) -> TokenData:
    """The file's samples, read when asked for. The whole file is read once here, to check it.

    Raises FileNotFoundError, or CorruptFileError for a file that is truncated or damaged.
    """
    try:
        file: Any = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        if metadata.get("format") != f"torchspec tokens {FORMAT_VERSION}":
            raise CorruptFileError(f"it is of another format ({metadata.get('format')})")
        sums = json.loads(metadata["crc32"])
        if zlib.crc32(metadata["facts"].encode()) != sums.pop("facts"):
            raise CorruptFileError("the checksum of its report is wrong")
        _check_sums(path, sums, progress)
        return TokenData(
            input_ids=file.get_slice("input_ids"),
            loss_mask=file.get_slice("loss_mask"),
            offsets=file.get_tensor("offsets"),
            token_counts_V=file.get_tensor("token_counts"),
            sample_ids=json.loads(file.get_tensor("sample_ids").numpy().tobytes()),
            images=file.get_slice("images"),
            image_offsets=file.get_tensor("image_offsets"),
            facts=json.loads(metadata["facts"]),
        )
    except SafetensorError as error:
        raise CorruptFileError(f"it is truncated or damaged ({error})") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise CorruptFileError(f"its description is damaged ({error})") from error


def _check_sums(path: Path, sums: dict[str, int], progress: ProgressSink | None) -> None:
    """Compare the checksum of every tensor; the header itself has been validated."""
    watch = Progress(progress, "check cache", path.stat().st_size)
    with path.open("rb") as file:
        base = 8 + (length := int.from_bytes(file.read(8), "little"))
        header = json.loads(file.read(length))
        for name, expected in sums.items():
            start, end = header[name]["data_offsets"]
            file.seek(base + start)
            found, left = 0, end - start
            while left > 0 and (chunk := file.read(min(_BLOCK, left))):
                found, left = zlib.crc32(chunk, found), left - len(chunk)
                watch.show(file.tell())
            if found != expected:
                raise CorruptFileError(f"the checksum of its {name} is wrong")
    watch.finish()
