"""Draft directories that serving engines load: written aside, checked by an independent reader, then put in place."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from torchspec.core import registry
from torchspec.core.errors import CheckpointError, UnavailableError
from torchspec.core.export.card import CARD, CardFacts, make_card, unchanged
from torchspec.core.export.seeming import what_it_seems
from torchspec.core.export.selfcheck import Probe, SelfCheck, check_files
from torchspec.core.export.speculators import is_speculators, verified_by
from torchspec.core.export.weights import WEIGHTS, read_tensors
from torchspec.core.interfaces.algorithm import Algorithm, AlgorithmSpec, DraftFiles
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.tensor_files import save_tensors

logger = logging.getLogger(__name__)

FORMATS = {"hf": "plain", "sglang": "plain", "vllm": "speculators"}
"""Command-line format to layout: the plain layouts serve in both engines (what is to be heeded is in
`DraftFiles.notes`), the speculators layout in vLLM alone."""

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class ExportContext:
    """What an export needs beside the draft: for the self-check the target's head, a device, and a recorded probe if
    there is one; what a model card is to say (None: no card is written)."""

    head: TargetHead
    device: Device
    probe: Probe | None = None
    card: CardFacts | None = None


def write_draft(
    algorithm: Algorithm,
    draft: nn.Module,
    layout: str,
    directory: Path,
    context: ExportContext,
    dtype: torch.dtype = torch.float32,
    also: Callable[[Path], None] | None = None,
) -> SelfCheck:
    """Write `draft` (unsharded) in `layout` and prove that an engine's reading of the files gives its predictions;
    `also` is called with the directory before it is put in place, and raises CheckpointError for what it finds.

    An existing draft directory is replaced only after the new one has passed, and nothing else ever is; what people
    must know before they serve it (`DraftFiles.notes`) goes to the log. Raises ConfigError where the layout cannot
    hold this draft, CheckpointError when the written files fail the check or cannot be written.
    """
    check_replaceable(directory)
    files = algorithm.to_files(stored_state(draft.state_dict(), dtype), layout)
    if context.card is not None and context.card.base_model is not None:
        files = replace(files, config=verified_by(files.config, context.card.base_model))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write a draft into {directory.parent}: {error.strerror}") from error
    try:
        save_files(files, aside)
        outcome = check_files(algorithm, draft, read_files(aside), context.head, context.device, context.probe)
        if context.card is not None:
            (aside / CARD).write_text(make_card(context.card, files, aside), encoding="utf-8")
        if also is not None:
            also(aside)
        _open_to_readers(aside)
        _replace(aside, directory)
        for note in files.notes:
            logger.warning("%s: %s", directory, note)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"writing the draft to {directory} failed: {error}; nothing was replaced. Free some space or name another "
            "directory, then run the export again"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return outcome


def stored_state(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As files hold it: copies on the CPU, contiguous, floating tensors in `dtype`."""
    return {name: _stored(tensor, dtype) for name, tensor in state.items()}


def save_files(files: DraftFiles, directory: Path) -> None:
    """What `read_files` reads."""
    save_tensors(files.tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(files.config, indent=2) + "\n")


def check_replaceable(directory: Path) -> None:
    """CheckpointError unless a draft may be put at `directory`: nothing is there, or a draft and no file beside it but
    a card that nobody has changed."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    refusal = f"{directory} exists and is not a draft directory"
    if not directory.is_dir() or not _is_draft(directory):
        raise CheckpointError(f"{refusal}, so it is not replaced: name another --output")
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in (CONFIG, WEIGHTS) and _mine(path))
    if foreign:
        raise CheckpointError(
            f"{refusal} alone, so it is not replaced: it also holds {', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}{' that was edited' if foreign == [CARD] else ''}. Move what is "
            "yours, or name another --output"
        )


def _mine(path: Path) -> bool:
    """Whether a file is a user's own."""
    try:
        return path.name != CARD or not unchanged(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return True


def _is_draft(directory: Path) -> bool:
    try:
        config = _read_config(directory)
    except (CheckpointError, OSError):
        return False
    return _reader(config) is not None


def read_files(directory: Path) -> DraftFiles:
    """config.json and every tensor of a draft's directory, on the CPU, as they are there.

    Raises CheckpointError when either is missing, malformed or truncated.
    """
    config = _read_config(directory)
    tensors, _ = read_tensors(directory)
    return DraftFiles(config=config, tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A draft's directory, whoever wrote it, in the form that an algorithm reads.

    files     of which `notes` say what was put otherwise on the way; nothing of what the draft computes
    stored    the files that its tensors were in
    """

    spec: AlgorithmSpec
    files: DraftFiles
    stored: tuple[str, ...]

    @property
    def layout(self) -> str:
        return "speculators" if is_speculators(self.files.config) else "plain"


def recognise(directory: Path, target: TargetSpec | None = None) -> Recognised:
    """Which algorithm's draft this is. Raises CheckpointError for one that none reads, saying what it seems to be."""
    config = _read_config(directory)
    tensors, stored = read_tensors(directory)
    found = DraftFiles(config=config, tensors=tensors)
    for spec in _specs():
        files = spec.published(found, target) if spec.published is not None else found
        if spec.reads(files.config):
            return Recognised(spec=spec, files=files, stored=stored)
    raise CheckpointError(
        f"{directory / CONFIG} describes {what_it_seems(found)}, which no algorithm here reads; "
        f"known: {', '.join(registry.algorithms().names())}"
    )


def read_draft(directory: Path, target: TargetSpec) -> tuple[Algorithm, nn.Module]:
    """Rebuild the algorithm and the draft from a directory in any published layout that some algorithm reads."""
    found = recognise(directory, target)
    for note in found.files.notes:
        logger.info("%s: %s", directory, note)
    return found.spec.from_files(found.files, target)


def _specs() -> Iterator[AlgorithmSpec]:
    """Of every algorithm. A plug-in that cannot be loaded is named in a warning and passed over."""
    for name in registry.algorithms().names():
        try:
            yield registry.algorithms().spec(name)
        except UnavailableError as error:
            logger.warning("%s", error)


def _reader(config: dict[str, Any]) -> AlgorithmSpec | None:
    """The algorithm whose draft a config.json describes."""
    return next((spec for spec in _specs() if spec.reads(config)), None)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {CONFIG}: a draft is a directory holding {CONFIG} and {WEIGHTS}, as written by "
            "`torchspec train` into draft/ or by `torchspec export`"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, expected an object")
    return config


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kept = tensor.detach().cpu()
    return (kept.to(dtype) if kept.is_floating_point() else kept).clone().contiguous()


def _open_to_readers(aside: Path) -> None:
    """The mode that the umask asks for: mkdtemp makes a directory for the owner alone, config.json shows the rest."""
    mode = stat.S_IMODE((aside / CONFIG).stat().st_mode)
    aside.chmod(0o700 | mode | (mode & 0o444) >> 2)


def _replace(aside: Path, directory: Path) -> None:
    """Put a finished directory in place; the old one is removed last, so that one of them always exists."""
    if not directory.exists():
        aside.rename(directory)
        return
    check_replaceable(directory)
    old = directory.with_name(f".{directory.name}-old-{os.getpid()}")
    directory.rename(old)
    aside.rename(directory)
    shutil.rmtree(old)
