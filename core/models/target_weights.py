"""Single tensors of a target's safetensors checkpoint, one file or sharded; the whole model is never read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchspec.core.errors import TargetError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

BLOCK, BLOCKS = 4096, 64


@dataclass(frozen=True, kw_only=True)
class TargetWeights:
    """Which file each tensor of a checkpoint is in."""

    path: Path
    files: Mapping[str, Path]

    @classmethod
    def open(cls, path: Path) -> TargetWeights:
        """The checkpoint in a target directory; every file's header is read, no tensor is.

        A header says how long its file must be, so a truncated download is found here. Raises TargetError when there
        are no weights, only pickled ones, a shard is missing, or a file is truncated or damaged.
        """
        single, index = path / SINGLE_FILE, path / INDEX_FILE
        if single.is_file():
            return cls(path=path, files=dict.fromkeys(_tensor_names(single), single))
        if not index.is_file():
            raise TargetError(_why_no_weights(path))
        files = {name: path / file for name, file in _weight_map(index).items()}
        shards = sorted(set(files.values()))
        missing = [file.name for file in shards if not file.is_file()]
        if missing:
            raise TargetError(
                f"{index} names {len(shards)} shards, of which {len(missing)} are not there: {', '.join(missing)}. "
                "Download the target again"
            )
        stored = {shard: _tensor_names(shard) for shard in shards}
        stray = [name for name, file in files.items() if name not in stored[file]]
        if stray:
            raise TargetError(
                f"{index} promises {len(stray)} tensors that its shards do not hold, among them {stray[0]} in "
                f"{files[stray[0]].name}: index and shards belong to different downloads"
            )
        return cls(path=path, files=files)

    def shape(self, name: str) -> tuple[int, ...]:
        with _open(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(
        self, name: str, *, dtype: torch.dtype, device: torch.device, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """One tensor, or its rows [start, stop) alone; TargetError when it is stored in a quantised form, which a cast
        would not undo."""
        with _open(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows[0] : rows[1]]
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise TargetError(
                f"{self.files[name]}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, a quantised "
                "form; torchspec reads embedding, norm and head in float32, bfloat16 or float16"
            )
        return tensor.to(device=device, dtype=dtype)


def weights_fingerprint(target: Path) -> str:
    """A digest that tells a target from a fine-tuned one: size and sampled blocks of each weight file.

    64 blocks of 4 KiB per file, evenly spread: any training changes nearly every block.
    """
    digest = hashlib.sha256()
    for file in sorted(target.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            for block in range(BLOCKS):
                stream.seek(max(0, size - BLOCK) * block // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise TargetError(
            f"{file} is truncated or damaged ({error}): {file.stat().st_size} bytes are there. Download it again"
        ) from error


def _tensor_names(file: Path) -> set[str]:
    with _open(file) as opened:
        return set(opened.keys())


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{index} is not an index of safetensors shards: {type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict):
        raise TargetError(f"{index}: `weight_map` must be an object of tensor names and files")
    return weight_map


def _why_no_weights(path: Path) -> str:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        return (
            f"{path} holds weights only as pickles ({', '.join(pickled[:3])}), which can run code when read and are "
            f"refused. Convert them once, if you trust their source: "
            f"AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained(NEW_DIRECTORY), copy the "
            "tokenizer's files, and give the new directory"
        )
    other = sorted(file.name for file in path.glob("*.safetensors"))
    hint = f" (there is {', '.join(other[:3])}, but no index says what is in it)" if other else ""
    return f"{path} has no weights: {SINGLE_FILE} or {INDEX_FILE} is needed{hint}"
