"""Features in a directory: one safetensors file a record, which any process that sees the directory may read.

A file describes itself: the header's metadata hold the id, the tap layers, the norm's state and the checksum. It gets
its name when it is whole, so a reader never meets half a record and a name never changes its content.

Shape letters: T tokens of the sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from torchspec.core.errors import DamagedRecordError, FeatureStoreError, MissingRecordError, StoreFullError
from torchspec.core.features.checks import check_features
from torchspec.core.features.checksums import checksum, row_sums
from torchspec.core.interfaces.features import Features, RecordRef, StoreUsage
from torchspec.core.tensor_files import save_tensors

SUFFIX = ".features.safetensors"
FORMAT = 1
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError)
_READABLE = re.compile(r"[^A-Za-z0-9_-]")


class DirectoryStore:
    """A `FeatureStore` over one directory. What is read is mapped from the file, not copied, and must not be written.

    `capacity`: bytes of records that the directory may hold; None: what its disk has.
    """

    def __init__(self, root: Path, *, capacity: int | None = None) -> None:
        """Make the directory if it is not there; FeatureStoreError when it cannot be used."""
        self.root, self.capacity = root, capacity
        self._closed = False
        try:
            root.mkdir(parents=True, exist_ok=True)
            writable = os.access(root, os.R_OK | os.W_OK | os.X_OK)
        except OSError as error:
            raise FeatureStoreError(f"the feature store {root} cannot be made: {error.strerror}") from error
        if not writable:
            raise FeatureStoreError(f"the feature store {root} cannot be read and written by this user")

    def put(self, record_id: str, features: Features) -> RecordRef:
        self._check_open()
        check_features(record_id, features)
        path = self.file(record_id)
        if path.exists():
            raise ValueError(f"record {record_id!r} is already stored in {self.root}: remove it before")
        self._check_room(record_id, features)
        sums_T = row_sums(features)
        digest = checksum(features, sums_T)
        tensors = {
            "input_ids": features.input_ids_T, "taps": features.taps_TNH, "last": features.last_TH, "row_sums": sums_T,
        }  # fmt: skip
        facts = {
            "format": FORMAT,
            "record_id": record_id,
            "length": len(features.input_ids_T),
            "tap_layers": list(features.tap_layers),
            "norm_state": features.norm_state,
            "checksum": digest,
        }
        aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            with _room_named(self.root, record_id):
                save_tensors({name: _on_host(tensor) for name, tensor in tensors.items()}, aside, _header(facts))
                os.link(aside, path)  # unlike a rename, it never replaces
        except FileExistsError:
            raise ValueError(f"record {record_id!r} is already stored in {self.root}: remove it before") from None
        finally:
            aside.unlink(missing_ok=True)
        return RecordRef(record_id=record_id, length=len(features.input_ids_T), checksum=digest)

    def find(self, record_id: str) -> RecordRef:
        """The reference of a record that another process put, read from its header; its content is not checked."""
        self._check_open()
        path = self.file(record_id)
        try:
            facts = _facts(path)
            return RecordRef(record_id=record_id, length=facts["length"], checksum=facts["checksum"])
        except FileNotFoundError:
            raise self._missing(record_id) from None
        except _UNREADABLE as error:
            raise DamagedRecordError(f"record {record_id!r} in {path} cannot be read: {error}") from error

    def get(self, ref: RecordRef) -> Features:
        self._check_open()
        path = self.file(ref.record_id)
        try:
            features, promised = _read(path)
        except FileNotFoundError:
            raise self._missing(ref.record_id) from None
        except _UNREADABLE as error:
            raise DamagedRecordError(f"record {ref.record_id!r} in {path} cannot be read: {error}") from error
        return _verified(ref, features, promised, path)

    def remove(self, ref: RecordRef) -> None:
        self._check_open()
        try:
            self.file(ref.record_id).unlink()
        except FileNotFoundError:
            raise self._missing(ref.record_id) from None

    def usage(self) -> StoreUsage:
        self._check_open()
        sizes = list(_sizes(self.root))
        return StoreUsage(records=len(sizes), nbytes=sum(sizes))

    def close(self) -> None:
        """The records stay."""
        self._closed = True

    def file(self, record_id: str) -> Path:
        """Where a record is, if it is there."""
        return self.root / (file_name(record_id) + SUFFIX)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the feature store {self.root} is closed")

    def _check_room(self, record_id: str, features: Features) -> None:
        if self.capacity is None:
            return
        need = sum(t.nbytes for t in (features.input_ids_T, features.taps_TNH, features.last_TH))
        used = sum(_sizes(self.root))
        if used + need > self.capacity:
            raise StoreFullError(
                f"record {record_id!r} takes {need / 1e6:.1f} MB, and the feature store {self.root} holds "
                f"{used / 1e6:.1f} MB of the {self.capacity / 1e6:.1f} MB it may hold"
            )

    def _missing(self, record_id: str) -> MissingRecordError:
        return MissingRecordError(
            f"record {record_id!r} is not in the feature store {self.root}: never captured, or already taken"
        )


def record_of(ref: RecordRef, data: bytes, where: object) -> Features:
    """From the bytes of a record's file; DamagedRecordError, which names `where` they are from."""
    try:
        size = int.from_bytes(data[:8], "little")
        facts = _checked(json.loads(data[8 : 8 + size])["__metadata__"])
        tensors = load(data)
        features = _features(facts, tensors.__getitem__)
    except _UNREADABLE as error:
        raise DamagedRecordError(f"record {ref.record_id!r} in {where} cannot be read: {error}") from error
    return _verified(ref, features, facts["checksum"], where)


def _verified(ref: RecordRef, features: Features, promised: str, where: object) -> Features:
    length = len(features.input_ids_T)
    if length != ref.length:
        raise DamagedRecordError(
            f"record {ref.record_id!r} in {where} has {length} tokens, its reference promises {ref.length}"
        )
    if promised != ref.checksum:
        raise DamagedRecordError(
            f"record {ref.record_id!r} in {where} is another one than its reference promises: checksum {promised}, "
            f"promised {ref.checksum or 'none'}"
        )
    if checksum(features, row_sums(features)) != promised:
        raise DamagedRecordError(f"record {ref.record_id!r} in {where} changed since it was written (checksum)")
    return features


def file_name(record_id: str) -> str:
    """A plain id as it is; of any other a readable part and a digest, so that no two share a file."""
    if _PLAIN.fullmatch(record_id) and not record_id.endswith(SUFFIX):
        return record_id
    digest = hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    return f"{_READABLE.sub('_', record_id)[:40]}+{digest}"


def _header(facts: dict[str, Any]) -> dict[str, str]:
    return {"torchspec": json.dumps(facts)}


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _read(path: Path) -> tuple[Features, str]:
    """The record and the checksum it was written with."""
    facts = _facts(path)
    with safe_open(path, framework="pt") as file:
        return _features(facts, file.get_tensor), facts["checksum"]


def _features(facts: dict[str, Any], tensor: Callable[[str], torch.Tensor]) -> Features:
    features = Features(
        input_ids_T=tensor("input_ids"),
        taps_TNH=tensor("taps"),
        last_TH=tensor("last"),
        tap_layers=tuple(facts["tap_layers"]),
        norm_state=facts["norm_state"],
    )
    check_features(facts["record_id"], features)
    return features


def _facts(path: Path) -> dict[str, Any]:
    """What the file says of itself."""
    path.stat()  # FileNotFoundError; safetensors has errors of its own for a missing file
    with safe_open(path, framework="pt") as file:
        return _checked(file.metadata() or {})


def _checked(metadata: Mapping[str, str]) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(metadata["torchspec"])
    if facts["format"] != FORMAT:
        raise ValueError(f"it is of format {facts['format']}, this torchspec reads {FORMAT}")
    return facts


def _sizes(root: Path) -> Iterator[int]:
    for entry in os.scandir(root):
        if entry.name.endswith(SUFFIX):
            try:
                yield entry.stat().st_size
            except FileNotFoundError:
                continue  # removed meanwhile


@contextmanager
def _room_named(root: Path, record_id: str) -> Iterator[None]:
    """A disk without room says so in torchspec's words. safetensors wraps the system's errors in its own."""
    try:
        yield
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        text = str(error)
        if "No space left" in text or "os error 28" in text:
            raise StoreFullError(f"no room for record {record_id!r} in the feature store {root}: {text}") from error
        raise FeatureStoreError(f"record {record_id!r} cannot be written to {root}: {text}") from error
