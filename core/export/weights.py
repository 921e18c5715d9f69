"""The tensors of a draft's directory, in whichever files its maker wrote them.

model.safetensors, or shards and their index; pytorch_model.bin, or shards and their index; training_state.pt with the
tensors under `draft_state_dict`. Pickled files are read as tensors alone: what else would run is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from torchspec.core.errors import CheckpointError

WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"
STATE, DRAFT_STATE = "training_state.pt", "draft_state_dict"
SHARDED = ".metadata"
"""What torch.distributed.checkpoint leaves in its directories."""


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(tensors on the CPU, names of the files they were in). Raises CheckpointError."""
    for name, load in ((WEIGHTS, _safetensors), (PICKLED, _pickled)):
        if (directory / name).is_file():
            return load(directory / name), (name,)
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _sharded(index, load)
    if (directory / STATE).is_file():
        return _draft_state(directory / STATE), (STATE,)
    raise CheckpointError(f"{directory} has no {WEIGHTS}: {_what_is_there(directory)}")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): export the draft again") from error


def _pickled(path: Path) -> dict[str, Tensor]:
    return _only_tensors(_loaded(path), path)


def _draft_state(path: Path) -> dict[str, Tensor]:
    state = _loaded(path)
    if not isinstance(state, Mapping) or DRAFT_STATE not in state:
        raise CheckpointError(f"{path} holds no {DRAFT_STATE}: it is not the training state of a draft")
    return _only_tensors(state[DRAFT_STATE], path)


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make an unpickler fail in any way
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as tensors alone, which is all that is read of a pickle ({reason}). If it is not "
            f"damaged, more is in it, which could run code: have its maker's own tool write {WEIGHTS} from it"
        ) from error


def _only_tensors(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    odd = [str(name) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{path}: not tensors: {', '.join(odd[:5])}")
    return {name: value.detach().contiguous() for name, value in state.items()}


def _sharded(index: Path, load: Callable[[Path], dict[str, Tensor]]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        inside = all(isinstance(name, str) and Path(name).name == name for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {type(error).__name__}: {error}") from error
    if not inside:
        raise CheckpointError(f"{index} names files outside its directory: {', '.join(map(str, files[:3]))}")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(files)} shards, of which {len(missing)} are not there: {', '.join(missing)}"
        )
    held: dict[str, dict[str, Tensor]] = {name: load(index.parent / name) for name in files}
    stray = [name for name, file in places.items() if name not in held[file]]
    if stray:
        raise CheckpointError(f"{index} promises tensors that its shards do not hold: {', '.join(stray[:5])}")
    return {name: held[file][name] for name, file in places.items()}, tuple(files)


def _what_is_there(directory: Path) -> str:
    """Of a directory without weights: what it seems to be, and what to do."""
    inner = [folder for folder in (directory, directory / "model") if (folder / SHARDED).is_file()]
    if inner:
        return (
            f"{inner[0]} is a sharded training checkpoint (torch.distributed.checkpoint), which is not read. Have the "
            "tool that wrote it export the draft, and give that directory"
        )
    steps = sorted(path.parent.name for path in directory.glob("*/config.json"))
    if steps:
        return f"it holds {', '.join(steps[:3])}{', ...' if len(steps) > 3 else ''}: name one of these"
    other = sorted(
        path.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)
    )
    if other:
        return f"there is {', '.join(other[:3])}, but no index says what is in it: rename a single file to {WEIGHTS}"
    return "not an exported draft"
