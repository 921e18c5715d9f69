"""Names to devices, engines, algorithms and trackers, found through entry points. Built-ins take the plug-ins' road.

An explicitly chosen name either works or fails with the cause and the remedy; nothing is ever replaced silently.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Generic, TypeVar

from torchspec.core.errors import ConfigError, Problem, UnavailableError
from torchspec.core.interfaces.algorithm import AlgorithmSpec
from torchspec.core.interfaces.device import API_VERSION, Availability, Device, DeviceSpec
from torchspec.core.interfaces.engine import EngineOptions, EngineProcess, EngineSpec, ServingEngine, TargetEngine
from torchspec.core.interfaces.tracker import TrackerSpec

log = logging.getLogger(__name__)

Spec = TypeVar("Spec", DeviceSpec, EngineSpec, AlgorithmSpec, TrackerSpec)


@dataclass(frozen=True)
class Registry(Generic[Spec]):
    """One entry-point group. Nothing is imported before a name is asked for."""

    kind: str
    spec_type: type[Spec]
    entries: Mapping[str, Sequence[metadata.EntryPoint]]
    """More than one of a name where distributions register it differently: then it cannot be used."""

    @classmethod
    def discover(cls, group: str, kind: str, spec_type: type[Spec]) -> Registry[Spec]:
        """Every entry of the group."""
        entries: dict[str, list[metadata.EntryPoint]] = {}
        for entry in metadata.entry_points(group=group):
            known = entries.setdefault(entry.name, [])
            if entry.value not in [other.value for other in known]:
                known.append(entry)
        return cls(kind, spec_type, entries)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.entries))

    def spec(self, name: str) -> Spec:
        """The light description of `name`.

        Raises ConfigError for an unknown name, UnavailableError when several distributions register it, and when its
        plug-in cannot be imported, does not hold a spec of this name, or speaks another version of the adapter API.
        """
        if name not in self.entries:
            raise ConfigError([self._unknown(name)])
        entry, *others = self.entries[name]
        if others:
            listed = " and ".join(f"{distribution(each)} ({each.value})" for each in (entry, *others))
            raise UnavailableError(
                f"{self.kind} {name!r} is registered by more than one installed distribution, {listed}: "
                "uninstall all but one of them"
            )
        origin = f"{self.kind} {name!r} ({distribution(entry)}, {entry.value})"
        try:
            spec = entry.load()
        except (Exception, SystemExit) as error:  # a plug-in may fail in any way; the cause goes to the user
            raise UnavailableError(f"{origin} cannot be loaded: {type(error).__name__}: {error}") from error
        if not isinstance(spec, self.spec_type):
            raise UnavailableError(
                f"{origin} is a {type(spec).__name__}, not a {self.spec_type.__name__}: the entry point must name one"
            )
        if spec.api_version != API_VERSION:
            raise UnavailableError(
                f"{origin} is written for adapter API {spec.api_version}, this torchspec speaks {API_VERSION}: "
                f"install a matching version of one of them"
            )
        if spec.name != name:
            raise UnavailableError(f"{origin} calls itself {spec.name!r}: the entry point must have the same name")
        return spec

    def _unknown(self, name: str) -> Problem:
        near = difflib.get_close_matches(name, self.entries, n=2)
        if len(near) == 2 and len({difflib.SequenceMatcher(None, each, name).ratio() for each in near}) == 1:
            near = []  # `gpu` is as near to `cpu` as to `npu`, and neither was meant
        return Problem(
            field=self.kind,
            value=name,
            message=f"no {self.kind} of this name is registered",
            choices=self.names(),
            remedy=f"did you mean {near[0]}?" if near else f"`torchspec doctor` lists every {self.kind}",
        )


def distribution(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown distribution"


@cache
def devices() -> Registry[DeviceSpec]:
    return Registry.discover("torchspec.devices", "device", DeviceSpec)


@cache
def backends() -> Registry[EngineSpec]:
    return Registry.discover("torchspec.backends", "backend", EngineSpec)


@cache
def algorithms() -> Registry[AlgorithmSpec]:
    return Registry.discover("torchspec.algorithms", "algorithm", AlgorithmSpec)


@cache
def trackers() -> Registry[TrackerSpec]:
    return Registry.discover("torchspec.trackers", "tracker", TrackerSpec)


def probe(spec: DeviceSpec | EngineSpec | TrackerSpec) -> Availability:
    """The spec's own answer; a probe that raises is an answer too."""
    try:
        return spec.probe()
    except (Exception, SystemExit) as error:  # a plug-in may fail in any way; the cause becomes the reason  # noqa: BLE001
        return Availability(ok=False, reason=f"its probe failed with {type(error).__name__}: {error}")


def available(spec: EngineSpec, device: str, process: EngineProcess) -> Availability:
    """Whether the engine can be had on this device in this way: its probe's answer, unless it knows a better one."""
    if spec.available is None:
        return probe(spec)
    try:
        return spec.available(device, process)
    except (Exception, SystemExit) as error:  # a plug-in may fail in any way; the cause becomes the reason  # noqa: BLE001
        return Availability(ok=False, reason=f"asking it failed with {type(error).__name__}: {error}")


def _require(kind: str, spec: DeviceSpec | EngineSpec, availability: Availability) -> None:
    if not availability.ok:
        hint = f"\n    remedy: {availability.hint}" if availability.hint else ""
        raise UnavailableError(f"{kind} {spec.name!r} is not available here: {availability.reason}{hint}")


def load_device(name: str) -> Device:
    """The device of this name, or UnavailableError with its probe's reason and hint."""
    spec = devices().spec(name)
    _require("device", spec, probe(spec))
    return spec.load()


def load_engine(name: str, options: EngineOptions) -> TargetEngine:
    """The engine of this name with the target loaded, or UnavailableError with the reason and a hint."""
    spec = backends().spec(name)
    _require("backend", spec, available(spec, options.device.name, options.process))
    return spec.load(options)


def load_serving(name: str, options: EngineOptions, draft: Path | None, draft_length: int) -> ServingEngine:
    """The target served by the engine of this name, with a draft or without; errors as of `load_engine`."""
    spec = backends().spec(name)
    _require("engine", spec, available(spec, options.device.name, options.process))
    if spec.serve is None:
        raise UnavailableError(f"engine {name!r} does not serve drafts")
    return spec.serve(options, draft, draft_length)


def choose_device(configured: str | None, environment: str | None) -> tuple[str, str]:
    """(name, where the choice came from): configuration, TORCHSPEC_DEVICE, the one accelerator here, or cpu.

    More than one available accelerator is an error: the choice is the user's. A plug-in that cannot be loaded was not
    asked for, so it is no error here: it is named in a warning and passed over.
    """
    if configured:
        return configured, "configuration"
    if environment:
        return environment, "TORCHSPEC_DEVICE"
    found = [name for name in devices().names() if name != "cpu" and _found_by_itself(name)]
    if len(found) > 1:
        raise ConfigError(
            [
                Problem(
                    field="device",
                    message="several accelerators are available here and none was named",
                    choices=tuple(found),
                    remedy="name one with --device",
                )
            ]
        )
    return (found[0], "the only accelerator found") if found else ("cpu", "no accelerator found")


def _found_by_itself(name: str) -> bool:
    try:
        spec = devices().spec(name)
    except UnavailableError as error:
        log.warning("%s", error)
        return False
    return probe(spec).ok
