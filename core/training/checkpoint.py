"""Sharded checkpoints: every rank writes and reads its own part, and a part never counts before all are on disk.

Tensors go through torch.distributed.checkpoint in its safetensors form, everything else is JSON: nothing that is
loaded is a pickle (DCP's own metadata file would be one). The world size may change between save and load.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchspec.core.errors import CheckpointError, TorchspecError
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.tensor_files import save_tensors
from torchspec.core.training import checkpoint_files as files
from torchspec.core.training.random_state import capture_state, restore_state, seed_rank

logger = logging.getLogger(__name__)

DRAFT, TRAINER, VOCABULARY, STATE, RNG = "draft.json", "trainer.json", "vocabulary.safetensors", "state", "rng"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds.

    tensors   this rank's view of weights and optimizer state by name (`draft.*`, `optimizer.*`); DTensors are
              stored as shards, plain tensors once
    own       further tensors of this rank, for the same number of ranks
    progress  JSON: step and counters
    facts     JSON: draft.json
    score     acceptance length validated at this step
    """

    step: int
    tensors: Mapping[str, Tensor]
    progress: dict[str, Any]
    facts: dict[str, Any]
    vocabulary: VocabularyMap
    own: Mapping[str, Tensor] = field(default_factory=dict)
    score: float | None = None


def save(checkpoints: Path, snapshot: Snapshot, context: ParallelContext, keep_last: int) -> Path:
    """Write a checkpoint, then drop those no longer kept. A collective.

    Raises CheckpointError on every rank if any could not write; what was there before is untouched then.
    """
    final = files.directory_of(checkpoints, snapshot.step)
    aside = final.with_name(f".{final.name}.partial")
    try:
        context.agree(lambda: _prepare(aside) if context.is_main else None)
        with _dcp_errors():
            writer = HuggingFaceStorageWriter(path=str(aside / STATE), save_distributed=True)
            state_dict_saver.save(dict(snapshot.tensors), storage_writer=writer, process_group=context.control)
        mine = context.agree(lambda: [asdict(file) for file in _finish_rank(aside, snapshot, context)])
        written = [files.StoredFile(**file) for part in context.gather(mine) for file in part]
        context.agree(lambda: _publish(aside, final, snapshot, written, context) if context.is_main else None)
    except (OSError, SafetensorError, TorchspecError) as error:
        if context.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(_not_written(checkpoints, snapshot.step, error)) from error
    context.main_only(lambda: files.note_saved(checkpoints))
    context.agree(lambda: files.prune(checkpoints, keep_last) if context.is_main else None)
    return final


def _prepare(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (aside / STATE).mkdir(parents=True)
    (aside / RNG).mkdir()


def _finish_rank(aside: Path, snapshot: Snapshot, context: ParallelContext) -> list[files.StoredFile]:
    """Write this rank's random states and own tensors; account for every file it wrote."""
    rng = _rng_file(aside, context.rank)
    own = {name: tensor.cpu() for name, tensor in snapshot.own.items()}
    save_tensors(capture_state(context.device.runtime) | own, rng)
    shards = sorted((aside / STATE).glob(f"shard-{context.rank + 1:05d}-*"))
    return [files.stored_file(aside, file) for file in [*shards, rng]]


def _publish(
    aside: Path, final: Path, snapshot: Snapshot, written: list[files.StoredFile], context: ParallelContext
) -> None:
    missing = [file.path for file in written if not (aside / file.path).is_file()]
    if missing:
        raise CheckpointError(
            f"rank 0 does not see {missing[0]}: the ranks must share the file system of {final.parent}"
        )
    save_tensors({"ids": snapshot.vocabulary.ids_N.cpu().contiguous()}, aside / VOCABULARY)
    files.write_json(aside / DRAFT, snapshot.facts)
    files.write_json(aside / TRAINER, snapshot.progress)
    written += [files.stored_file(aside, aside / name) for name in (VOCABULARY, DRAFT, TRAINER)]
    manifest = files.Manifest(
        step=snapshot.step, world_size=context.world_size, score=snapshot.score, files=tuple(written)
    )
    files.write_manifest(aside, manifest)
    for directory in (aside / STATE, aside / RNG, aside):
        files.sync_directory(directory)
    files.put_in_place(aside, final)


def _not_written(checkpoints: Path, step: int, error: BaseException) -> str:
    kept = files.steps_on_disk(checkpoints)
    survivor = f"{files.directory_of(checkpoints, kept[-1])} is intact" if kept else "there is no earlier one"
    again = "there" if kept else "anew"
    return (
        f"the checkpoint of step {step} could not be written to {checkpoints}: {error}; {survivor}. "
        f"Make room (or the directory writable) and start the same command again: it begins {again}"
    )


def choose(checkpoints: Path, context: ParallelContext) -> Path | None:
    """The newest whole checkpoint, every file verified; None when there is none at all. A collective.

    A damaged one is reported, renamed `*.damaged` and passed over for the one before it; a damaged best one is set
    aside as well. Raises CheckpointError when there are checkpoints and none is whole: training from scratch would
    hide the loss.
    """
    context.agree(lambda: files.remove_leftovers(checkpoints) if context.is_main else None)
    steps: list[int] = context.broadcast(files.steps_on_disk(checkpoints) if context.is_main else None)
    reasons: list[str] = []
    for step in reversed(steps):
        candidate = files.directory_of(checkpoints, step)
        try:
            context.agree(partial(_verify_share, candidate, context))
        except TorchspecError as error:
            reasons.append(f"step {step}: {error}")
            logger.warning("checkpoint %s is damaged and not used: %s", candidate, error)
            if context.is_main:
                files.set_aside(checkpoints, step)
            continue
        if reasons:
            logger.warning("resuming from the previous checkpoint, step %d, instead", step)
        context.main_only(lambda: files.whole_best(checkpoints))  # a damaged best one would not be surpassed
        return candidate
    if reasons:
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is whole:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
            + "\nThey were renamed *.damaged. Start again in a new --output, or restore one from a copy"
        )
    return None


def _verify_share(checkpoint: Path, context: ParallelContext) -> None:
    files.verify(checkpoint, files.read_manifest(checkpoint).files[context.rank :: context.world_size])


def load(
    checkpoint: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any], context: ParallelContext
) -> dict[str, Any]:
    """Fill `tensors` in place, restore this rank's random states, and return the saved progress. A collective.

    Raises CheckpointError when the checkpoint belongs to another run (naming what differs) or holds other tensors.
    """
    refuse_other_run(checkpoint, files.read_json(checkpoint / DRAFT), facts)
    with _dcp_errors():
        reader = HuggingFaceStorageReader(path=str(checkpoint / STATE))
        stored = set(reader.read_metadata().state_dict_metadata)
        if stored != set(tensors):
            odd = sorted(stored ^ set(tensors))
            raise CheckpointError(f"{checkpoint} does not fit this draft: {len(odd)} tensors differ, first {odd[0]!r}")
        state_dict_loader.load(dict(tensors), storage_reader=reader, process_group=context.control)
    _restore_rng(checkpoint, context, facts["identity"]["order"]["seed"])
    return files.read_json(checkpoint / TRAINER)


def _restore_rng(checkpoint: Path, context: ParallelContext, seed: int) -> None:
    manifest = files.read_manifest(checkpoint)
    if manifest.world_size != context.world_size:
        logger.warning(
            "the checkpoint was written by %d ranks, this run has %d: data order and weights continue exactly, "
            "random states are drawn anew",
            manifest.world_size,
            context.world_size,
        )
        seed_rank(context.device.runtime, seed, manifest.step, context.rank)
        return
    restore_state(context.device.runtime, load_file(_rng_file(checkpoint, context.rank)))


def own_tensors(checkpoint: Path, context: ParallelContext) -> dict[str, Tensor]:
    """What `Snapshot.own` held on this rank, beside its random states; nothing for another number of ranks."""
    if files.read_manifest(checkpoint).world_size != context.world_size:
        return {}
    return load_file(_rng_file(checkpoint, context.rank))


def _rng_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / RNG / f"rank_{rank:05d}.safetensors"


def best_score(checkpoints: Path) -> float | None:
    """Greatest acceptance length of the checkpoints there are; None when none was validated."""
    best = files.best_step(checkpoints)
    return None if best is None else best[1]


def load_draft_state(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(draft.json, the whole draft's state on the CPU), verified; needs no process group.

    Raises CheckpointError when the directory is no whole checkpoint.
    """
    manifest = files.read_manifest(checkpoint)
    files.verify(checkpoint, manifest.files)
    with _dcp_errors():
        reader = HuggingFaceStorageReader(path=str(checkpoint / STATE))
        described = reader.read_metadata().state_dict_metadata
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in described.items()
            if name.startswith("draft.") and isinstance(entry, TensorStorageMetadata)
        }
        state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    weights = {name.removeprefix("draft."): tensor for name, tensor in state.items()}
    return files.read_json(checkpoint / DRAFT), weights


def load_vocabulary(checkpoint: Path) -> VocabularyMap:
    """The checkpoint's vocabulary map: it belongs to the weights and is never recomputed."""
    size = files.read_json(checkpoint / DRAFT)["identity"]["vocabulary"]["target_size"]
    try:
        ids_N = load_file(checkpoint / VOCABULARY)["ids"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{checkpoint / VOCABULARY} cannot be read: {error}") from error
    return VocabularyMap(ids_N=ids_N, target_size=size)


def refuse_other_run(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """CheckpointError with every difference of the `identity` sections.

    The data are compared by their ingredients where both sides list them, else by the fingerprint.
    """
    theirs, ours = saved.get("identity"), current["identity"]
    if theirs and "data" in saved and "data" in current:
        theirs, ours = {**theirs, "data": saved["data"]}, {**ours, "data": current["data"]}
    found = list(differences(theirs, ours))
    if found:
        listed = "\n".join(f"  - {line}" for line in found)
        raise CheckpointError(
            f"{checkpoint} belongs to another run and cannot be resumed with this configuration:\n{listed}\n"
            "Undo the change, or train in a new --output"
        )


def differences(
    saved: Any, current: Any, path: str = "", names: tuple[str, str] = ("the checkpoint", "this run")
) -> Iterator[str]:
    """One line for every value of two JSON trees, called by these names, that is not the same."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(saved.get(key), current.get(key), inner, names)
    elif saved != current:
        yield f"{path}: {names[0]} has {saved!r}, {names[1]} {current!r}"


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """DCP's exception (not an `Exception`) as ours, with the cause of the first rank that failed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # DCP of torch 2.10
        try:
            yield
        except CheckpointException as error:
            rank, failure = next(iter(error.failures.items()))
            cause = failure[0] if isinstance(failure, tuple) else failure
            raise CheckpointError(f"rank {rank}: {cause}") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(str(error)) from error
