"""Checkpoint directories on disk: which are whole, which is best, which may go.

checkpoints/
    step_00000200/            appears by a rename, when everything in it has reached the disk
        manifest.json         written last: step, world size, score, and size and SHA-256 of every other file
        draft.json            what is needed to rebuild the draft, and to refuse a resume that would not fit
        trainer.json          step, counters
        vocabulary.safetensors
        state/*.safetensors   one file per rank: fp32 weights (`draft.*`) and AdamW state (`optimizer.*`)
        rng/rank_*.safetensors   random states; moments in codes where the optimizer holds them so
    best.json                 for people: the validated checkpoint with the greatest acceptance length
../.checkpointed              there has been a checkpoint
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchspec.core.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST, BEST = "manifest.json", "best.json"
REPLACED, DAMAGED = ".replaced", ".damaged"
CHECKPOINTED = ".checkpointed"
NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a checkpoint, named relative to it."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`score` is the acceptance length validated at this step, if one was."""

    step: int
    world_size: int
    score: float | None
    files: tuple[StoredFile, ...]
    format_version: int = FORMAT_VERSION


def directory_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def stored_file(checkpoint: Path, file: Path) -> StoredFile:
    """Bring a file to the disk and take its size and checksum."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return StoredFile(path=file.relative_to(checkpoint).as_posix(), bytes=file.stat().st_size, sha256=digest)


def write_json(file: Path, value: Any) -> None:
    """Written aside, brought to the disk and renamed, so that the file is always whole."""
    aside = file.with_name(f".{file.name}.partial")
    with aside.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    write_json(checkpoint / MANIFEST, asdict(manifest))


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises CheckpointError when the manifest is missing, damaged or of another format."""
    path = checkpoint / MANIFEST
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{checkpoint} has checkpoint format {version}; this torchspec reads {FORMAT_VERSION}: "
                "use the version that wrote it (draft.json names it)"
            )
        files = tuple(StoredFile(**file) for file in fields.pop("files"))
        return Manifest(files=files, **fields)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): not a whole checkpoint") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def verify(checkpoint: Path, files: Iterable[StoredFile]) -> None:
    """Compare files with what the manifest says of them; CheckpointError names the first that differs."""
    for file in files:
        path = checkpoint / file.path
        try:
            size = path.stat().st_size
            if size != file.bytes:
                raise CheckpointError(f"{path} is truncated or changed: {size} bytes, the manifest says {file.bytes}")
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
        if digest != file.sha256:
            raise CheckpointError(f"{path} is damaged: its checksum differs from the manifest's")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: a {type(value).__name__}, expected an object")
    return value


def steps_on_disk(checkpoints: Path) -> list[int]:
    """Steps with a checkpoint directory, ascending; whether it is whole is another question."""
    if not checkpoints.is_dir():
        return []
    found = [NAME.fullmatch(entry.name) for entry in checkpoints.iterdir() if entry.is_dir()]
    return sorted(int(match.group(1)) for match in found if match)


def set_aside(checkpoints: Path, step: int) -> Path:
    """Take a damaged checkpoint out of the numbered ones, so that the step can be saved again."""
    source = directory_of(checkpoints, step)
    target = source.with_name(f"{source.name}{DAMAGED}")
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
    return target


def note_saved(checkpoints: Path) -> None:
    """Leave a mark that outlives the checkpoints: without them, the run is not to be taken for a new one."""
    with contextlib.suppress(OSError):  # a full disk: the checkpoint itself is there
        (checkpoints.parent / CHECKPOINTED).touch()


def lost(checkpoints: Path) -> bool:
    """Whether there have been checkpoints and none is left to resume from.

    Runs of earlier versions left no mark; of those, the ones that finished left a draft.
    """
    if steps_on_disk(checkpoints) or any(checkpoints.glob(f".step_*{REPLACED}")):
        return False
    marked = any((checkpoints.parent / name).exists() for name in (CHECKPOINTED, "draft"))
    return marked or any(checkpoints.glob(f"step_*{DAMAGED}"))


def put_in_place(aside: Path, final: Path) -> None:
    """Give a finished directory its name. One of the same step goes only when the new one stands."""
    replaced = final.with_name(f".{final.name}{REPLACED}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    aside.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Clear away what a killed process was writing, replacing or removing."""
    for replaced in checkpoints.glob(f".step_*{REPLACED}"):
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED))
        if not final.exists():
            replaced.rename(final)
    for entry in checkpoints.glob(".step_*"):
        shutil.rmtree(entry, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Rename first: a removal that is cut short never leaves something that looks like a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def best_step(checkpoints: Path) -> tuple[int, float] | None:
    """(step, acceptance length) of the best validated checkpoint that is there; the earlier of equals."""
    best: tuple[int, float] | None = None
    for step in steps_on_disk(checkpoints):
        try:
            score = read_manifest(directory_of(checkpoints, step)).score
        except CheckpointError:
            continue  # reported when it is chosen for a resume
        if score is not None and (best is None or score > best[1]):
            best = (step, score)
    return best


def whole_best(checkpoints: Path) -> Path | None:
    """The best validated checkpoint that is whole, else the newest; None when there is none.

    Damaged ones are reported and set aside on the way.
    """
    while steps := steps_on_disk(checkpoints):
        best = best_step(checkpoints)
        step = steps[-1] if best is None else best[0]
        directory = directory_of(checkpoints, step)
        try:
            verify(directory, read_manifest(directory).files)
        except CheckpointError as error:
            logger.warning("checkpoint %s is damaged and not used, renamed *%s: %s", directory, DAMAGED, error)
            set_aside(checkpoints, step)
            write_best(checkpoints)
            continue
        return directory
    return None


def write_best(checkpoints: Path) -> None:
    """best.json, from the manifests."""
    best = best_step(checkpoints)
    if best is None:
        (checkpoints / BEST).unlink(missing_ok=True)
    else:
        name = directory_of(checkpoints, best[0]).name
        write_json(checkpoints / BEST, {"step": best[0], "acceptance_length": best[1], "checkpoint": name})


def prune(checkpoints: Path, keep_last: int) -> None:
    """Keep the newest `keep_last` and the best; write best.json."""
    best = best_step(checkpoints)
    steps = steps_on_disk(checkpoints)
    for step in steps[:-keep_last]:
        if best is None or step != best[0]:
            remove(directory_of(checkpoints, step))
    write_best(checkpoints)
