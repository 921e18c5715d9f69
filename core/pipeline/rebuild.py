"""A draft from files: a checkpoint of a run, or an exported directory to start from."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchspec.core import registry
from torchspec.core.errors import CheckpointError, ConfigError
from torchspec.core.export.layout import read_draft
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec, resolve_target
from torchspec.core.training import checkpoint
from torchspec.core.training.checkpoint_files import (
    BEST,
    MANIFEST,
    directory_of,
    read_json,
    read_manifest,
    steps_on_disk,
)


@dataclass(frozen=True, kw_only=True)
class RebuiltDraft:
    """An unsharded draft on the CPU with everything its export needs."""

    algorithm: Algorithm
    draft: nn.Module
    target: TargetSpec
    head: TargetHead
    vocabulary: VocabularyMap
    step: int


def find_checkpoint(path: Path) -> Path:
    """A checkpoint from its own directory, from a run directory or its `checkpoints`: there the best, else the newest.

    Raises CheckpointError when there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if (checkpoints / BEST).is_file():
        return checkpoints / str(read_json(checkpoints / BEST)["checkpoint"])
    steps = steps_on_disk(checkpoints)
    if not steps:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run with one: name a directory like RUN/checkpoints/step_00000200, "
            "or RUN itself"
        )
    return directory_of(checkpoints, steps[-1])


def rebuild(directory: Path, *, target: Path | None = None) -> RebuiltDraft:
    """The draft of a checkpoint (see `find_checkpoint`); `target` replaces the place where its target was.

    Raises CheckpointError when the checkpoint is damaged, TargetError when the target cannot be read.
    """
    found = find_checkpoint(directory)
    facts, state = checkpoint.load_draft_state(found)
    path = resolve_target(target if target is not None else facts["target_path"])
    spec = read_target_spec(path, bool(facts["config"]["target"]["trust_remote_code"]))
    algorithm = _algorithm(found, facts, spec)
    vocabulary = checkpoint.load_vocabulary(found)
    head = load_target_head(path, dtype=torch.float32, device=torch.device("cpu"))
    draft = algorithm.build_draft(vocabulary, head)
    load_state(draft, state, found)
    step = read_manifest(found).step
    return RebuiltDraft(algorithm=algorithm, draft=draft, target=spec, head=head, vocabulary=vocabulary, step=step)


def _algorithm(found: Path, facts: dict[str, Any], target: TargetSpec) -> Algorithm:
    """From the options in draft.json; files they name are restored from it for as long as that takes."""
    spec = registry.algorithms().spec(facts["identity"]["algorithm"])
    values = dict(facts["config"]["draft"])
    with tempfile.TemporaryDirectory() as place:
        for name, text in facts["option_files"].items():
            file = Path(place) / f"{name}.json"
            file.write_text(text, encoding="utf-8")
            values[name] = file
        try:
            return spec.create(spec.options(**values), target)
        except ConfigError as error:
            raise CheckpointError(f"{found} does not fit the target at {target.path}: {error}") from error


def load_state(draft: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load strictly; CheckpointError names what is missing, unknown or misshapen."""
    own = draft.state_dict()
    odd = [f"{name} is missing" for name in own if name not in state]
    odd += [f"{name} is unknown" for name in state if name not in own]
    odd += [
        f"{name} has shape {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if odd:
        raise CheckpointError(f"{source} does not fit this draft: " + "; ".join(odd))
    draft.load_state_dict(state)


def read_initial(path: Path, target: TargetSpec) -> tuple[dict[str, Tensor], VocabularyMap]:
    """State and vocabulary map to start from: of a checkpoint, a run or an exported draft."""
    if (path / MANIFEST).is_file() or (path / "checkpoints").is_dir() or steps_on_disk(path):
        found = find_checkpoint(path)
        return checkpoint.load_draft_state(found)[1], checkpoint.load_vocabulary(found)
    _, draft = read_draft(path, target)
    state = draft.state_dict()
    offsets = state.get("d2t")
    if offsets is None:
        return state, VocabularyMap.identity(target.vocab_size)
    return state, VocabularyMap.from_offsets(offsets, target.vocab_size)
