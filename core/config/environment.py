"""What a configuration asks of this machine: adapters that can be used, files that exist, a writable output."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchspec.core import registry
from torchspec.core import settings as variables
from torchspec.core.errors import ConfigError, Problem, TorchspecError
from torchspec.core.interfaces.device import Availability
from torchspec.core.interfaces.engine import EngineProcess
from torchspec.core.registry import Registry

EMBEDDED = "embedded"
"""The name of the target that ships with torchspec."""

_INPUT_FILES = ("data.train", "data.validation", "target.chat_template")


def default_device() -> tuple[str, str]:
    """(name, why): `TORCHSPEC_DEVICE`, the only accelerator here, or cpu."""
    return registry.choose_device(None, variables.default_device())


def problems(tree: Mapping[str, Any], *, planned: bool = False) -> list[Problem]:
    """What of the merged, unvalidated settings cannot work here. Values of a wrong type are left to the schema.

    `planned`: for another machine, maybe, so that adapters have to be known and no more.
    """
    found = unknown_adapters(tree) if planned else absent_adapters(tree)
    target = tree.get("target", {}).get("path")
    if isinstance(target, str | Path):
        found += target_problems("target.path", Path(target))
    for field in _INPUT_FILES:
        section, _, key = field.partition(".")
        value = tree.get(section, {}).get(key)
        items = value if isinstance(value, list | tuple) else [value]
        found += file_problems(field, [Path(item) for item in items if isinstance(item, str | Path)])
    found += tracker_problems(tree.get("train", {}))
    output = tree.get("output")
    if isinstance(output, str | Path):
        found += output_problems("output", Path(output))
    return found


def unknown_adapters(tree: Mapping[str, Any]) -> list[Problem]:
    """Why there is no such device or backend as these settings name, here or elsewhere."""
    named = (
        (_device_field(tree), tree.get("device") or variables.default_device(), registry.devices()),
        ("backend", tree.get("backend", "hf"), registry.backends()),
    )
    return [
        problem for field, name, known in named if isinstance(name, str) for problem in _unknown(field, name, known)
    ]


def absent_adapters(tree: Mapping[str, Any]) -> list[Problem]:
    """Why the device and the backend that these settings name cannot be used here."""
    found: list[Problem] = []
    device = tree.get("device") or variables.default_device()
    if isinstance(device, str):
        found += adapter_problems(_device_field(tree), device, registry.devices())
    backend = tree.get("backend", "hf")
    if isinstance(backend, str):
        found += engine_problems("backend", backend, device, tree.get("engine"))
    return found


def _device_field(tree: Mapping[str, Any]) -> str:
    """What names the device: the setting, or the variable that stands for it."""
    return "device" if tree.get("device") else "device (TORCHSPEC_DEVICE)"


def adapter_problems(field: str, name: str, known: Registry[Any]) -> list[Problem]:
    """Why a device, backend or tracker of this name cannot be used here; [] if it can."""
    return _unknown(field, name, known) or _unavailable(field, name, registry.probe(known.spec(name)))


def _unknown(field: str, name: str, known: Registry[Any]) -> list[Problem]:
    try:
        known.spec(name)
    except ConfigError as error:
        return [replace(problem, field=field) for problem in error.problems]
    except TorchspecError as error:
        return [Problem(field=field, value=name, message=str(error))]
    return []


def engine_problems(field: str, name: str, device: object, section: object = None) -> list[Problem]:
    """Why the target engine of this name cannot be had on a device (None: the default one) in the way that the
    `engine` section of a configuration says; [] if it can."""
    values = dict(section) if isinstance(section, Mapping) else {}
    python, url = values.get("python"), values.get("url")
    process = EngineProcess(
        python=Path(python) if isinstance(python, str | Path) else None, url=url if isinstance(url, str) else None
    )
    try:
        chosen, _ = registry.choose_device(device if isinstance(device, str) else None, variables.default_device())
    except ConfigError:
        chosen = "cpu"  # several accelerators and none named, which is reported for itself
    known = registry.backends()
    return _unknown(field, name, known) or _unavailable(
        field, name, registry.available(known.spec(name), chosen, process)
    )


def tracker_problems(train: Mapping[str, Any]) -> list[Problem]:
    """Which of `train.trackers` cannot be used here, each with the reason."""
    names, found = train.get("trackers"), list[Problem]()
    if train.get("project") and not names:
        remedy = "name some in train.trackers too, or leave it out"
        found.append(Problem(field="train.project", message="is for trackers", remedy=remedy))
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list | tuple) else []
    for number, name in enumerate(listed):
        if name in listed[:number]:
            found.append(Problem(field="train.trackers", value=name, message="named twice"))
        else:
            found += adapter_problems("train.trackers", name, registry.trackers())
    return found


def _unavailable(field: str, name: str, availability: Availability) -> list[Problem]:
    if availability.ok:
        return []
    message = f"not available here: {availability.reason}"
    return [Problem(field=field, value=name, message=message, remedy=availability.hint)]


def target_problems(field: str, path: Path) -> list[Problem]:
    """What shows at a glance that no target is at `path`; its contents are checked where they are read."""
    if str(path) == EMBEDDED or (path.expanduser() / "config.json").is_file():
        return []
    message = "no such directory"
    remedy = f"name a directory with config.json, safetensors and tokenizer, or `{EMBEDDED}`"
    if path.expanduser().is_dir():
        message = "no config.json in this directory"
    elif path.expanduser().is_file():
        message = "is a file"
    elif len(path.parts) == 2 and not path.is_absolute():  # OWNER/NAME
        remedy += f". Nothing is downloaded; if it is on the Hugging Face hub: `hf download {path} --local-dir DIR`"
    else:
        remedy += "; nothing is downloaded"
    return [Problem(field=field, value=str(path), message=message, remedy=remedy)]


def file_problems(field: str, paths: Iterable[Path]) -> list[Problem]:
    """Which of the input files are not there."""
    found: list[Problem] = []
    for path in paths:
        if path.is_dir():
            found.append(Problem(field=field, value=str(path), message="is a directory", remedy="name the files in it"))
        elif not path.exists():
            found.append(Problem(field=field, value=str(path), message="no such file"))
    return found


def output_problems(field: str, path: Path) -> list[Problem]:
    """Why no directory can be made or written at `path`; [] if one can."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return [Problem(field=field, value=str(path), message=f"{nearest} is a file, not a directory")]
    if not os.access(nearest, os.W_OK | os.X_OK):
        remedy = "name another directory or change the permissions"
        return [Problem(field=field, value=str(path), message=f"{nearest} is not writable", remedy=remedy)]
    return []
