"""`torchspec doctor`: what can be used here, and what the rest lacks."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from torchspec.cli.console import announce, print_table
from torchspec.cli.options import Parser, add_options, all_flags, read_options
from torchspec.cli.schemas import JsonOption
from torchspec.core.errors import TorchspecError

if TYPE_CHECKING:
    from torchspec.core.registry import Registry

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")
OPTIONAL_PACKAGES = ("ray", "pyarrow", "tensorboard", "wandb", "mlflow")


def parser() -> Parser:
    made = Parser(
        "doctor",
        "List every registered device, engine and algorithm: whether it can be used here, why not, and what to\n"
        "install. Exit code 0 if at least one device and one engine can be used, 1 otherwise.",
    )
    add_options(made, JsonOption, all_flags(JsonOption))
    return made


def run(words: Sequence[str]) -> int:
    options = read_options(parser(), JsonOption, words)
    announce("looking at devices, engines and algorithms")
    found = examine()
    if options.json_output:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    usable = all(any(entry["available"] for entry in found[kind]) for kind in ("devices", "backends"))
    return 0 if usable else 1


def examine() -> dict[str, Any]:
    """Versions, and per device, backend and algorithm: name, available, reason, remedy, where it is registered."""
    from torchspec.core import registry

    return {
        "torchspec": metadata.version("torchspec"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch_build": _torch_build(),
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL_PACKAGES)},
        "devices": [_adapter(registry.devices(), name) for name in registry.devices().names()],
        "backends": [_adapter(registry.backends(), name) for name in registry.backends().names()],
        "algorithms": [_adapter(registry.algorithms(), name) for name in registry.algorithms().names()],
    }


def _torch_build() -> str:
    import torch

    versions = ((name, getattr(torch.version, name, None)) for name in ("cuda", "hip", "xpu"))
    return next((f"{name} {version}" for name, version in versions if version), "cpu only")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _adapter(known: Registry[Any], name: str) -> dict[str, Any]:
    from torchspec.core import registry
    from torchspec.core.interfaces.algorithm import AlgorithmSpec
    from torchspec.core.interfaces.device import Availability

    registered_by = ", ".join(registry.distribution(entry) for entry in known.entries[name])
    facts: dict[str, Any] = {"name": name, "registered_by": registered_by}
    try:
        spec = known.spec(name)
        answer = Availability(ok=True) if isinstance(spec, AlgorithmSpec) else registry.probe(spec)
    except TorchspecError as error:
        return {**facts, "available": False, "reason": str(error), "remedy": "", "capabilities": []}
    return {
        **facts,
        "available": answer.ok,
        "reason": answer.reason,
        "remedy": answer.hint,
        "capabilities": sorted(spec.capabilities),
    }


def _show(found: dict[str, Any]) -> None:
    print(f"torchspec {found['torchspec']}, Python {found['python']}, {found['platform']}")
    print(f"torch build: {found['torch_build']}")
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items()))
    print()
    for kind in ("devices", "backends", "algorithms"):
        rows = [
            (
                entry["name"],
                "yes" if entry["available"] else "no",
                escape("; ".join(part for part in (entry["reason"], entry["remedy"]) if part)),
            )
            for entry in found[kind]
        ]
        print_table(kind, ("name", "usable", "why, and what to do"), rows, figures=False)
