"""What a directory of captured features holds: of which target and data, which records, and what could not be captured.

FEATURES/
    capture.json                    of what they are; written before the first record
    00000000.features.safetensors   one record for each sample, named by its place in the data
    manifest.json                   written last: with it, the capture is whole
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchspec.core.errors import FeatureStoreError, MissingRecordError
from torchspec.core.interfaces.features import NormState

FORMAT = 1
CAPTURE, MANIFEST = "capture.json", "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A sample without features, and why."""

    sample_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Of a finished capture; every sample is captured or lost.

    identity   JSON: what the features are features of; a training on them must be about the same
    circumstances  JSON: how they were captured, for people
    rows       JSON: what became of the rows of data; kept = samples
    nbytes     of the records' files
    checksums  of every record, by the sample's place in the data; None where it is lost
    lost       by the sample's place
    """

    identity: dict[str, Any]
    circumstances: dict[str, Any]
    rows: dict[str, Any]
    norm_state: NormState
    nbytes: int
    checksums: tuple[str | None, ...]
    lost: Mapping[int, Lost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        without = {index for index, checksum in enumerate(self.checksums) if checksum is None}
        assert without == set(self.lost), "a sample is neither captured nor accounted for"
        assert self.rows["kept"] == len(self.checksums), "the rows of data make other samples"

    @property
    def captured(self) -> int:
        return len(self.checksums) - len(self.lost)

    def save(self, directory: Path) -> None:
        """Replaces what is there at once; OSError when the disk refuses."""
        values = asdict(self)
        values |= {"format": FORMAT, "samples": len(self.checksums), "captured": self.captured}
        write_json(directory / MANIFEST, values)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """MissingRecordError where no capture was finished; FeatureStoreError for a file that cannot be used."""
        path = directory / MANIFEST
        try:
            values = read_json(path)
        except FileNotFoundError:
            if (directory / CAPTURE).is_file():
                why = "its capture has not finished: give the same `torchspec capture` command again to go on with it"
            else:
                why = "make them with `torchspec capture`" if directory.is_dir() else "there is no such directory"
            raise MissingRecordError(f"{directory} holds no captured features ({MANIFEST}): {why}") from None
        if values.pop("format", None) != FORMAT:
            raise FeatureStoreError(f"{path} is of another format than this torchspec reads ({FORMAT})")
        try:
            samples, captured = values.pop("samples"), values.pop("captured")
            lost = {int(index): Lost(**each) for index, each in values.pop("lost").items()}
            made = cls(**{**values, "checksums": tuple(values["checksums"]), "lost": lost})
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise FeatureStoreError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if (samples, captured) != (len(made.checksums), made.captured):
            raise FeatureStoreError(f"{path} is damaged: it counts other records than it lists")
        return made


def record_name(index: int) -> str:
    """The record of the sample at this place in the data."""
    return f"{index:08d}"


def differences(theirs: Any, ours: Any, path: str = "") -> Iterator[str]:
    """One line for each value of two JSON trees that is not the same."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            yield from differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else str(key))
    elif theirs != ours:
        yield f"{path}: the features have {theirs!r}, this run {ours!r}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FileNotFoundError, and FeatureStoreError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise FeatureStoreError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise FeatureStoreError(f"{path} is damaged: a {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Written aside, brought to the disk and renamed: whole or not at all. OSError when the disk refuses."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
