"""The directory of a capture: whether it may go on there, what of it is there already, and who writes to it."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchspec.core.errors import DamagedRecordError, FeatureStoreError, MissingRecordError
from torchspec.core.features.directory import SUFFIX, DirectoryStore
from torchspec.core.features.manifest import CAPTURE, MANIFEST, read_json, record_name, write_json
from torchspec.core.features.stored_rows import read_rows
from torchspec.core.interfaces.features import NormState
from torchspec.core.pipeline.assembly import ProgressSink
from torchspec.core.pipeline.engine_setup import ENGINE
from torchspec.core.pipeline.offline import refuse_other_features
from torchspec.core.training.capturing import Samples

logger = logging.getLogger(__name__)

LOCK = ".lock"
OURS = (LOCK, ENGINE, f".{CAPTURE}.partial")
"""What a capture may have left that was stopped before it said what it is of."""
READERS, AT_ONCE = 4, 256


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A whole record that is there."""

    checksum: str
    norm_state: NormState


@contextmanager
def opened(directory: Path) -> Iterator[DirectoryStore]:
    """The store, of which this process is the only writer."""
    store = DirectoryStore(directory)
    try:
        lock = (directory / LOCK).open("w")
    except OSError as error:
        raise FeatureStoreError(f"the feature store {directory} cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FeatureStoreError(
                f"another capture is writing to {directory}: wait, or name another output"
            ) from error
        yield store


def claim(directory: Path, identity: dict[str, Any], groups: dict[str, Any], about: dict[str, Any]) -> None:
    """Take the directory for these features, or go on with the same ones; FeatureStoreError for anything else.

    Features of other `groups` are the same but for rounding: a capture goes on with its own alone. `about` is told.
    """
    ours = {**identity, "captured": groups}
    try:
        theirs = read_json(directory / CAPTURE)
    except FileNotFoundError:
        foreign = sorted(path.name for path in directory.iterdir() if path.name not in OURS)
        if foreign:
            shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            message = f"{directory} holds {shown}, and no capture to go on with: name an empty directory"
            raise FeatureStoreError(message) from None
        try:
            write_json(directory / CAPTURE, {"features": ours, "about": about})
        except OSError as error:
            raise FeatureStoreError(f"the feature store {directory} cannot be written ({error.strerror})") from error
    else:
        refuse_other_features(directory, theirs.get("features", {}), ours)


def kept_records(store: DirectoryStore, samples: Samples, progress: ProgressSink | None) -> dict[int, Kept]:
    """The whole records that are there, by the sample's place. Damaged ones are named and removed, and with them the
    manifest that promises them; so is what a killed process left of a record it was writing."""
    for torn in store.root.glob(f".*{SUFFIX}.*"):
        torn.unlink(missing_ok=True)
    names = {path.name for path in store.root.iterdir()}
    there = [index for index in range(len(samples)) if record_name(index) + SUFFIX in names]
    kept: dict[int, Kept] = {}
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(there), AT_ONCE):
            some = there[start : start + AT_ONCE]
            for index, found in zip(some, readers.map(lambda i: _checked(store, i, samples), some), strict=True):
                if isinstance(found, Kept):
                    kept[index] = found
                else:
                    logger.warning("%s; it is captured again", found)
                    (store.root / MANIFEST).unlink(missing_ok=True)
                    (store.root / (record_name(index) + SUFFIX)).unlink()
            if progress is not None:
                progress("check what is there", start + len(some), len(there))
    return kept


def to_disk(directory: Path, index: int) -> None:
    """Wait until the record will be there after a power failure too."""
    with (directory / (record_name(index) + SUFFIX)).open("rb") as stream:
        os.fsync(stream.fileno())


def _checked(store: DirectoryStore, index: int, samples: Samples) -> Kept | FeatureStoreError:
    name = record_name(index)
    try:
        promised = store.find(name).checksum
        features = read_rows(store.root, name, promised)
    except (MissingRecordError, DamagedRecordError) as error:
        return error
    if not torch.equal(features.input_ids_T, samples[index].input_ids_T):
        return DamagedRecordError(f"record {name} in {store.root} is of other tokens")
    return Kept(checksum=promised, norm_state=features.norm_state)
