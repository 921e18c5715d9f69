"""A head of several tokens' prediction is served from inside its target: a directory of the target with the head in it.

Of links, but for what changes: files that hold a head of the target's own are written again without it, and the index
and config.json name the new one. Engines read every tensor of every file that the index names, so a tensor may be in
one of them alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from torchspec.core.errors import TargetError
from torchspec.core.models.target_weights import INDEX_FILE, SINGLE_FILE, TargetWeights
from torchspec.core.tensor_files import save_tensors

CONFIG = "config.json"
FROM_TARGET, FROM_HEAD = "model-target.safetensors", "model-torchspec-mtp.safetensors"
FIELDS = ("architectures", "num_nextn_predict_layers")
"""Of the head's config.json: how many heads there are, and whose they are."""


def is_head(draft: Path) -> bool:
    """Whether a draft directory holds a head that `mtp` trained. False for what cannot be read: engines say so."""
    try:
        ours = json.loads((draft / CONFIG).read_text(encoding="utf-8")).get("torchspec")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(ours, dict) and ours.get("algorithm") == "mtp"


def target_with_head(target: Path, head: Path, directory: Path) -> Path:
    """`directory`, which is made, with its links resolved: the target with this head. It needs both of them for as long
    as it is used.

    TargetError when either cannot be read.
    """
    target, head, directory = target.resolve(), head.resolve(), directory.resolve()
    names = TargetWeights.open(head).stored.keys()
    stored = TargetWeights.open(target).stored
    files = {name: tensor.file for name, tensor in stored.items() if name not in names}
    stale = {tensor.file for name, tensor in stored.items() if name in names}
    directory.mkdir(parents=True)
    placed = {file: FROM_TARGET if file.name == SINGLE_FILE else file.name for file in set(files.values())}
    for file, name in placed.items():
        if file in stale:
            _without(file, names, directory / name)
        else:
            (directory / name).symlink_to(file)
    (directory / FROM_HEAD).symlink_to(head / SINGLE_FILE)
    index = {name: placed[file] for name, file in files.items()} | dict.fromkeys(names, FROM_HEAD)
    _write(directory / INDEX_FILE, {"metadata": {}, "weight_map": index})
    stated = _read(head / CONFIG)
    _write(directory / CONFIG, _read(target / CONFIG) | {name: stated[name] for name in FIELDS if name in stated})
    for file in target.iterdir():
        if file.suffix != ".safetensors" and file.name not in (CONFIG, INDEX_FILE):
            (directory / file.name).symlink_to(file)
    return directory


def _without(file: Path, names: Collection[str], place: Path) -> None:
    try:
        with safe_open(file, "pt") as opened:
            kept = {name: opened.get_tensor(name) for name in opened.keys() if name not in names}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TargetError(f"{file} cannot be read: {error}") from error
    save_tensors(kept, place, metadata={"format": "pt"})


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"{path} cannot be read: {error}") from error
    return found


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
