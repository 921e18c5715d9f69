"""A draft from files: a checkpoint of a run, or an exported directory to start from."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from torchspec.core import registry
from torchspec.core.config.schema import stated
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.export.layout import read_draft, recognise
from torchspec.core.export.selfcheck import Probe
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec, resolve_target
from torchspec.core.pipeline.run_dir import PROBE
from torchspec.core.training import checkpoint
from torchspec.core.training.checkpoint_files import (
    MANIFEST,
    best_step,
    directory_of,
    read_json,
    read_manifest,
    steps_on_disk,
)

logger = logging.getLogger(__name__)

# The number of taps is compared with the taps; more positions change nothing in a draft that rotates.
_NO_DIFFERENCE = {"num_taps", "max_position_embeddings"}
# Of the target a checkpoint was trained for: what its draft's geometry was derived from.
_TARGET_FACTS = (
    "num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
)  # fmt: skip


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
    best = best_step(checkpoints)  # the manifests say which it is; best.json repeats it for people
    if best is not None:
        return directory_of(checkpoints, best[0])
    steps = steps_on_disk(checkpoints)
    if not steps:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run with one: name a directory like RUN/checkpoints/step_00000200, "
            "or RUN itself"
        )
    return directory_of(checkpoints, steps[-1])


def rebuild(directory: Path, *, target: Path | None = None, trust_remote_code: bool = False) -> RebuiltDraft:
    """The draft of a checkpoint (see `find_checkpoint`); `target` replaces the place where its target was.

    Whether the target's own code may run is for the caller to say: that a checkpoint was trained so is no permission.
    Raises CheckpointError when the checkpoint is damaged, TargetError when the target cannot be read.
    """
    found = find_checkpoint(directory)
    facts, state = checkpoint.load_draft_state(found)
    path = resolve_target(target if target is not None else facts["target_path"])
    spec = read_target_spec(path, trust_remote_code)
    algorithm = _algorithm(found, facts, spec)
    vocabulary = checkpoint.load_vocabulary(found)
    head = load_target_head(path, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
    draft = algorithm.build_draft(vocabulary, head)
    load_state(draft, state, found)
    step = read_manifest(found).step
    return RebuiltDraft(algorithm=algorithm, draft=draft, target=spec, head=head, vocabulary=vocabulary, step=step)


def recorded_probe(run: Path) -> Probe | None:
    """The features recorded in a run directory for the self-check; without (whole) ones it draws random features."""
    path = run / PROBE
    if not path.is_file():
        return None
    try:
        return Probe.load(path)
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("%s is damaged and not used, the export is checked on random features: %s", path, error)
        return None


def _algorithm(found: Path, facts: dict[str, Any], target: TargetSpec) -> Algorithm:
    """From the options in draft.json; files they name are restored from it for as long as that takes."""
    spec = registry.algorithms().spec(facts["identity"]["algorithm"])
    values = stated(spec.options, facts["config"]["draft"])
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
    if _is_training(path):
        found = find_checkpoint(path)
        return checkpoint.load_draft_state(found)[1], checkpoint.load_vocabulary(found)
    _, draft = read_draft(path, target)
    state = draft.state_dict()
    offsets = state.get("d2t")
    if offsets is None:
        return state, VocabularyMap.identity(target.vocab_size)
    return state, VocabularyMap.from_offsets(offsets, target.vocab_size)


def _is_training(path: Path) -> bool:
    return (path / MANIFEST).is_file() or (path / "checkpoints").is_dir() or bool(steps_on_disk(path))


def check_algorithm(path: Path, name: str, target: TargetSpec) -> str:
    """The algorithm of the draft at `path`, which must be the one called `name`, or one with the same drafts: of those
    that differ in what they teach alone the same function reads the files.

    Raises ConfigError where it is another one, CheckpointError where none reads what is there.
    """
    if _is_training(path):
        found = str(read_json(find_checkpoint(path) / checkpoint.DRAFT)["identity"]["algorithm"])
    else:
        found = recognise(path, target).spec.name
    if found != name and len({registry.algorithms().spec(each).from_files for each in (found, name)}) > 1:
        problem = Problem(
            field="draft.init_from",
            value=str(path),
            message=f"is a draft of {found}, and this run trains {name}",
            remedy=f"train it further with --algorithm {found}, or leave draft.init_from out for a fresh {name} draft",
        )
        raise ConfigError([problem])
    return found


def initial_problems(path: Path, algorithm: Algorithm, target: TargetSpec) -> list[Problem]:
    """Everything in which the draft at `path` is another than `algorithm` is going to train.

    Weights of the same shapes would load all the same, and mean something else. Raises CheckpointError when there is
    no readable draft.
    """
    initial = _initial_algorithm(path, target)
    found = []
    if initial.taps != algorithm.taps:
        found.append(
            Problem(
                field="draft.taps",
                value=list(algorithm.taps),
                message=f"the draft in draft.init_from reads {list(initial.taps)}",
                remedy=f"draft.taps={list(initial.taps)}",
            )
        )
    theirs, ours = asdict(initial.geometry), asdict(algorithm.geometry)
    names = sorted((theirs.keys() | ours.keys()) - _NO_DIFFERENCE)
    other = [name for name in names if theirs.get(name) != ours.get(name)]
    if other:
        found.append(
            Problem(
                field="draft.init_from",
                value=str(path),
                message="; ".join(f"its {name} is {theirs.get(name)}, this draft's {ours.get(name)}" for name in other),
                remedy="draft.config=FILE with its config.json, which `torchspec export` writes for a checkpoint",
            )
        )
    return found


def _initial_algorithm(path: Path, target: TargetSpec) -> Algorithm:
    if not _is_training(path):
        return read_draft(path, target)[0]
    found = find_checkpoint(path)
    facts = read_json(found / checkpoint.DRAFT)
    saved = facts["identity"]["target"]
    facts_then = {name: saved[name] for name in _TARGET_FACTS}
    # Checkpoints older than drafts with latent attention do not have it, and need it not.
    return _algorithm(found, facts, replace(target, **facts_then, latent_sizes=saved.get("latent_sizes")))
