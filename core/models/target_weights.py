"""Single tensors of a target's safetensors checkpoint, one file or sharded; the whole model is never read.

A quantised weight (`core.models.target_quantised`) is one tensor here, under the name and with the shape that it has
where nothing is quantised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchspec.core.errors import TargetError
from torchspec.core.models.target_quantisation import described, read_quantisation, unread
from torchspec.core.models.target_quantised import QuantisedWeight, StoredTensor, find_quantised, parts_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

BLOCK, BLOCKS = 4096, 64
AT_ONCE = 1 << 25
"""Elements that are dequantised at a time."""


@dataclass(frozen=True, kw_only=True)
class TargetWeights:
    """Which file each tensor of a checkpoint is in.

    stored        every tensor as it lies there, the parts of quantised weights among them
    quantised     the quantised weights that can be read
    faults        what is wrong with others, by the names of their codes
    quantisation  what the target's configuration says of it (None: nothing)
    """

    path: Path
    files: Mapping[str, Path]
    stored: Mapping[str, StoredTensor]
    quantised: Mapping[str, QuantisedWeight] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    quantisation: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: Path) -> TargetWeights:
        """The checkpoint in a target directory; every file's header is read, no weight is.

        A header says how long its file must be, so a truncated download is found here. Raises TargetError when there
        are no weights, only pickled ones, a shard is missing, or a file is truncated or damaged.
        """
        stored = _stored(path)
        quantisation = read_quantisation(path)
        quantised, faults = ({}, {}) if quantisation is None else find_quantised(stored, quantisation)
        parts = parts_of(quantised)
        files = {name: tensor.file for name, tensor in stored.items() if name not in parts}
        main = {name: stored[next(iter(weight.parts.values()))].file for name, weight in quantised.items()}
        return cls(
            path=path,
            files=files | main,
            stored=stored,
            quantised=quantised,
            faults=faults,
            quantisation=quantisation,
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return self.quantised[name].shape if name in self.quantised else self.stored[name].shape

    def read(
        self, name: str, *, dtype: torch.dtype, device: torch.device, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """One tensor, or its rows [start, stop) alone. What a quantised weight stands for is computed in float32.

        TargetError when it is quantised in a form that torchspec does not read, which a cast would not undo.
        """
        if name in self.quantised:
            return self._dequantised(name, rows, dtype, device)
        tensor = self._values(name, () if rows is None else (slice(*rows),))
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise TargetError(self._why_unreadable(name))
        return tensor.to(device=device, dtype=dtype)

    def check_readable(self) -> None:
        """TargetError naming a tensor of codes alone: whoever loads the checkpoint would take them for weights."""
        plain = (name for name in self.files if name not in self.quantised)
        codes = next((name for name in plain if name in self.faults or self.stored[name].narrow), None)
        if codes is not None:
            raise TargetError(self._why_unreadable(codes))

    def why_not_found(self, module: str) -> str:
        """What stands in the way of finding this module's weight, as far as it is quantised; else nothing."""
        fault = next((fault for name, fault in self.faults.items() if name.rpartition(".")[0].endswith(module)), None)
        if fault is not None:
            return f". It is quantised: {fault}"
        form = unread(self.quantisation) if self.quantisation is not None else None
        return "" if form is None else f". The target is quantised in a form that torchspec does not read ({form})"

    def _dequantised(self, name: str, rows: tuple[int, int] | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Some rows at a time, so that little is in float32."""
        weight = self.quantised[name]
        start, stop = rows or (0, weight.shape[0])
        whole = torch.empty(stop - start, *weight.shape[1:], dtype=dtype, device=device)
        at_once = max(1, AT_ONCE * weight.shape[0] // prod(weight.shape))
        if device.type != "meta":
            for first in range(start, stop, at_once):
                last = min(first + at_once, stop)
                whole[first - start : last - start] = weight.read(self._values, (first, last))
        return whole

    def _why_unreadable(self, name: str) -> str:
        if name in self.faults:
            return f"{self.files[name]}: {self.faults[name]}. Dequantise the target first"
        if self.quantisation is None:
            why = "of which config.json says nothing"
        elif reason := unread(self.quantisation):
            why = f"that torchspec does not read ({reason})"
        else:
            why = f"without the scales that {described(self.quantisation)} has"
        stored = str(self._values(name, ()).dtype).removeprefix("torch.")
        return (
            f"{self.files[name]}: {name} is stored as {stored}, a quantised form {why}. Take a checkpoint in which it "
            "is float32, bfloat16 or float16, or dequantise it first"
        )

    def _values(self, name: str, places: tuple[slice, ...]) -> Tensor:
        with _open(self.stored[name].file) as file:
            tensor: Tensor = file.get_slice(name)[places] if places else file.get_tensor(name)
        return tensor


def weights_fingerprint(target: Path) -> str:
    """A digest that tells a target from a fine-tuned one: size and sampled blocks of each weight file.

    64 blocks of 4 KiB per file, evenly spread: any training changes nearly every block. What the configuration says of
    quantisation is part of it, since the bytes mean something else without it.
    """
    digest = hashlib.sha256()
    if quantisation := read_quantisation(target):
        digest.update(json.dumps(quantisation, sort_keys=True).encode())
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


def _stored(path: Path) -> dict[str, StoredTensor]:
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_file():
        return _tensors(single)
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
    held = {shard: _tensors(shard) for shard in shards}
    stray = [name for name, file in files.items() if name not in held[file]]
    if stray:
        raise TargetError(
            f"{index} promises {len(stray)} tensors that its shards do not hold, among them {stray[0]} in "
            f"{files[stray[0]].name}: index and shards belong to different downloads"
        )
    return {name: held[file][name] for name, file in files.items()}


def _tensors(file: Path) -> dict[str, StoredTensor]:
    """What a file's header says, and the few numbers that say how large a packed weight is."""
    found = {}
    with _open(file) as opened:
        names = opened.keys()
        for name in names:
            entry = opened.get_slice(name)
            says = tuple(opened.get_tensor(name).tolist()) if name.endswith(".weight_shape") else ()
            found[name] = StoredTensor(file=file, shape=tuple(entry.get_shape()), dtype=entry.get_dtype(), says=says)
    return found


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
