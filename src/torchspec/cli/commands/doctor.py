"""`torchspec doctor`: what can be used here, what the rest lacks, and whether an adapter keeps its contract."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.markup import escape

from torchspec.cli.console import announce, print_table
from torchspec.cli.options import Parser, add_options, all_flags, flag_of, read_options
from torchspec.cli.schemas import EngineFlags, JsonOption
from torchspec.core.errors import ConfigError, Problem, TorchspecError

if TYPE_CHECKING:
    from torchspec.core.interfaces.device import DeviceSpec
    from torchspec.core.registry import Registry

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")
OPTIONAL_PACKAGES = ("ray", "pyarrow", "tensorboard", "wandb", "mlflow", "trackio")

_EVERYWHERE = ("json_output", "conformance", "conformance_backend")
_OF_TARGETS = ("target", "device", "dtype", "trust_remote_code", "engine_python", "engine_url")
"""What `--target` is looked at with, where no adapter is put through checks."""
_NO_CHECKS = ("chat_template", "thinking")
"""Of every other command with a target; no check formats a conversation."""


class DoctorOptions(JsonOption, EngineFlags):
    target: Path = Field(Path("embedded"), description="target to look at, or for --conformance-backend")
    conformance: str | None = Field(None, description="put the adapter of this device through its contract's checks")
    conformance_backend: str | None = Field(None, description="put this engine through its contract's checks")
    topics: list[str] = Field([], description="make only the checks of these topics, e.g. attention collectives")


def parser() -> Parser:
    made = Parser(
        "doctor",
        "List every registered device, engine, algorithm and tracker: whether it can be used here, why not, and what\n"
        "to install. Exit code 0 if at least one device and one engine can be used, 1 otherwise.\n\n"
        "With --target DIR: how its weights are stored (a quantisation, which engines can run it here, what the hf\n"
        "engine makes of it), from its headers alone. Exit code 1 if no engine can run it, too.\n\n"
        "With --conformance DEVICE or --conformance-backend ENGINE: put that adapter through the checks of its\n"
        "contract (docs/add-hardware.md, docs/add-backend.md), print a table with figures and a verdict. Exit code 0\n"
        "if no check failed, 1 otherwise. The other options but --json are for these checks.",
    )
    flags = all_flags(DoctorOptions)
    own = ("json_output", "conformance", "conformance_backend", "topics", "target")
    rest = [name for name in flags if name not in (*own, "backend")]
    add_options(made, DoctorOptions, {name: flags[name] for name in (*own, *rest)})
    return made


def run(words: Sequence[str]) -> int:
    options = read_options(parser(), DoctorOptions, words)
    if problems := _misplaced(options):
        raise ConfigError(problems)
    if options.conformance is not None or options.conformance_backend is not None:
        return _conformance(options)
    announce("looking at devices, engines, algorithms and trackers")
    found = examine()
    if "target" in options.model_fields_set:
        from torchspec.cli.target_engines import examine_target

        found["target"] = examine_target(options)
    if options.json_output:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    needed = [found["devices"], found["backends"], *([found["target"]["engines"]] if "target" in found else [])]
    return 0 if all(any(entry["available"] for entry in kind) for kind in needed) else 1


def _misplaced(options: DoctorOptions) -> list[Problem]:
    """The options that were given and would change nothing."""
    problems: list[Problem] = []
    if options.conformance is not None and options.conformance_backend is not None:
        problems = [
            Problem(field="--conformance-backend", message="one adapter at a time", remedy="leave out --conformance")
        ]
    for name in DoctorOptions.model_fields:  # in the order of --help
        if name not in options.model_fields_set or name in _EVERYWHERE:
            continue
        if name in _NO_CHECKS:
            message, remedy = "no check is made with it", "leave it out"
        elif name == "topics" and options.conformance is None and options.conformance_backend is None:
            message = "is of the checks of an adapter, and none is named"
            remedy = "name it with --conformance or --conformance-backend"
        elif name != "topics" and options.conformance_backend is None:
            if options.conformance is None and name in _OF_TARGETS and "target" in options.model_fields_set:
                continue
            message, remedy = "is of the checks of an engine", "name one with --conformance-backend, or leave it out"
            if name in _OF_TARGETS and options.conformance is None:
                message, remedy = "is of a target", "name one with --target, or leave it out"
        else:
            continue
        problems.append(Problem(field=flag_of(name), message=message, remedy=remedy))
    return problems


def _conformance(options: DoctorOptions) -> int:
    from torchspec.cli.conformance import BACKEND, DEVICE, device_words, engine_words, run_conformance

    if options.conformance is not None:
        from torchspec.devices import conformance as of_devices

        name = options.conformance
        words = device_words("--conformance", name)
        _check_topics(options.topics, of_devices.TOPICS)
        return run_conformance(DEVICE, name, of_devices.CHECKS, words, options.topics, as_json=options.json_output)
    from torchspec.backends import conformance as of_backends

    assert options.conformance_backend is not None
    name = options.conformance_backend
    words = engine_words(options.model_copy(update={"backend": name}))
    _check_topics(options.topics, of_backends.TOPICS)
    return run_conformance(BACKEND, name, of_backends.CHECKS, words, options.topics, as_json=options.json_output)


def _check_topics(topics: Sequence[str], known: Sequence[str]) -> None:
    unknown = [
        Problem(field="--topics", value=topic, message="no check is about it", choices=tuple(known))
        for topic in topics
        if topic not in known
    ]
    if unknown:
        raise ConfigError(unknown)


def examine() -> dict[str, Any]:
    """Versions, and per device, backend, algorithm and tracker: name, available, reason, remedy, who registered it."""
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
        "trackers": [_adapter(registry.trackers(), name) for name in registry.trackers().names()],
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
    from torchspec.core.interfaces.device import Availability, DeviceSpec

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
        "capabilities": sorted(getattr(spec, "capabilities", ())),
        **(_fp8(spec) if isinstance(spec, DeviceSpec) and answer.ok else {}),
    }


def _fp8(spec: DeviceSpec) -> dict[str, str]:
    """How a device that can be used multiplies FP8 matrices: native, emulated or absent."""
    try:
        support = spec.load().ops.fp8
    except TorchspecError as error:
        return {"fp8": "absent", "fp8_reason": str(error)}
    return {"fp8": support.kind, "fp8_reason": support.reason}


def _fp8_text(entry: dict[str, Any]) -> str:
    if "fp8" not in entry:
        return ""
    return f"fp8 {entry['fp8']}" + (f": {entry['fp8_reason']}" if entry["fp8_reason"] else "")


def _show(found: dict[str, Any]) -> None:
    print(f"torchspec {found['torchspec']}, Python {found['python']}, {found['platform']}")
    print(f"torch build: {found['torch_build']}")
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items()))
    print()
    for kind in ("devices", "backends", "algorithms", "trackers"):
        _print_usable(kind, found[kind])
    if "target" in found:
        from torchspec.cli.target_engines import lines

        print("\n".join(lines(found["target"])))
        _print_usable("engines for this target", found["target"]["engines"])


def _print_usable(title: str, entries: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            entry["name"],
            "yes" if entry["available"] else "no",
            escape("; ".join(part for part in (entry["reason"], entry["remedy"], _fp8_text(entry)) if part)),
        )
        for entry in entries
    ]
    print_table(title, ("name", "usable", "why, and what to do"), rows, figures=False)
