"""What a topology asks of the configuration, and what it chooses where nothing is said."""

from __future__ import annotations

import importlib.util

from torchspec.core import registry
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import Problem
from torchspec.core.interfaces.device import Device, DeviceSpec
from torchspec.core.interfaces.engine import EngineSpec
from torchspec.core.pipeline.served_checks import given

APPLIES = {
    "inprocess": frozenset({"topology"}),
    "colocated": frozenset({"topology", "engines", "store", "prefetch_mb", "multiplex"}),
    "disaggregated": frozenset({"topology", "engines", "trainers", "store", "prefetch_mb"}),
    "offline": frozenset({"topology", "features", "prefetch_mb"}),
}
"""Settings of the `pipeline` section that mean something, by topology."""


ENGINE_FRACTION, RESERVE_FRACTION, LEAST_FRACTION = 0.5, 0.05, 0.05
"""Of a device that engine and trainer share: the engine's, unless said; what neither counts (contexts, kernels); and
less than which no trainer can use."""


def engine_fraction(config: RunConfig, device_type: str) -> float | None:
    """Of each device's memory, for the engine; None: as the engine does by itself."""
    given = config.engine.memory_fraction
    if given is None and config.pipeline.topology == "colocated" and device_type != "cpu":
        return ENGINE_FRACTION
    return given


def trainer_fraction(config: RunConfig, device_type: str) -> float:
    """Of the memory of the device that a rank may have."""
    if config.pipeline.topology != "colocated" or device_type == "cpu":
        return 1.0
    return 1.0 - (engine_fraction(config, device_type) or 0.0) - RESERVE_FRACTION


def engines_in_all(config: RunConfig) -> int:
    """Of a disaggregated run."""
    return config.pipeline.engines or 1


def trainers_in_all(config: RunConfig) -> int:
    """Of a disaggregated run."""
    return config.pipeline.trainers or 1


def choose_store(config: RunConfig, device: Device, backend: EngineSpec) -> str:
    """How features come from the engines: as said, else by where they are.

    Buffers on the device where engine and trainer are on the same one, or it is the host; files in shared memory for
    engines whose own processes write. Across machines Mooncake, where this process has it and the engine shares its
    environment; else the workers send them.
    """
    pipeline = config.pipeline
    if pipeline.store != "auto":
        return pipeline.store
    if pipeline.topology == "disaggregated" and config.ray.address is not None:
        return "mooncake" if backend.start is None and mooncake_is_here() else "stream"
    memory = device.shared_memory
    near = memory is not None and (pipeline.topology == "colocated" or memory.reads_in_place)
    return "device" if near and backend.start is None else "shared"


def topology_problems(config: RunConfig, device: DeviceSpec | None, backend: EngineSpec | None) -> list[Problem]:
    """Settings that the topology would ignore, each by its name, and those that it cannot do with."""
    pipeline = config.pipeline
    found = [
        Problem(
            field=f"pipeline.{name}",
            value=str(getattr(pipeline, name)),
            message=f"means nothing with pipeline.topology={pipeline.topology}",
            remedy="leave it out, or name another topology",
        )
        for name in given(pipeline)
        if name not in APPLIES[pipeline.topology]
    ]
    if pipeline.topology != "disaggregated":
        message, remedy = "is for pipeline.topology=disaggregated", "leave it out"
        for section in ("ray", "mooncake"):
            names = given(getattr(config, section))
            found += [Problem(field=f"{section}.{name}", message=message, remedy=remedy) for name in names]
    if pipeline.topology == "inprocess":
        return found
    if pipeline.topology == "offline":
        return [*found, *_offline_problems(config)]
    if config.target.tensor_parallel > 1:
        message = f"the target is in engines of their own with pipeline.topology={pipeline.topology}"
        remedy = "give engine.tensor_parallel instead"
        value = config.target.tensor_parallel
        found.append(Problem(field="target.tensor_parallel", value=value, message=message, remedy=remedy))
    if config.engine.url is not None:
        message = "is for pipeline.topology=inprocess: other topologies start their engines themselves"
        found.append(Problem(field="engine.url", value=config.engine.url, message=message, remedy="leave it out"))
    return [*found, *_memory_problems(config, device, backend), *_store_problems(config, device, backend)]


def mooncake_is_here() -> bool:
    return importlib.util.find_spec("mooncake") is not None


def _memory_problems(config: RunConfig, device: DeviceSpec | None, backend: EngineSpec | None) -> list[Problem]:
    given, message, remedy = config.engine.memory_fraction, "", ""
    if given is None or device is None:
        return []
    if device.device_type == "cpu" and backend is not None and backend.start is None:
        message, remedy = f"backend {backend.name} shares a CPU's memory with everybody", "leave it out"
    elif trainer_fraction(config, device.device_type) < LEAST_FRACTION:
        most = 1 - RESERVE_FRACTION - LEAST_FRACTION
        message, remedy = "leaves the trainer no memory on the device that they share", f"give at most {most:g}"
    return [Problem(field="engine.memory_fraction", value=given, message=message, remedy=remedy)] if message else []


def _store_problems(config: RunConfig, device: DeviceSpec | None, backend: EngineSpec | None) -> list[Problem]:
    """Of a way for features to come that is not there."""
    store, topology, why = config.pipeline.store, config.pipeline.topology, ""
    if store == "mooncake" and topology != "disaggregated":
        why = "engine and trainer share a machine, whose memory is faster"
    elif store == "mooncake" and backend is not None and backend.start is not None:
        why = f"the environment of {backend.name} has no Mooncake"
    if store in ("shared", "device") and topology == "disaggregated" and config.ray.address is not None:
        why = "engines and ranks may be on different machines of the cluster"
    if store == "device" and not why and backend is not None and backend.start is not None:
        why = f"the processes of {backend.name} write into files"
    if store == "device" and not why and device is not None and registry.probe(device).ok:
        shared = device.load().shared_memory
        if shared is None:
            why = f"device {device.name} shares no memory between processes"
        elif topology == "disaggregated" and not shared.reads_in_place:
            why = "engine and trainer are on different devices"
    if not why:
        names = given(config.mooncake) if topology == "disaggregated" else []  # else they are named already
        across = backend is None or (backend.start is None and mooncake_is_here())
        if names and not (store == "mooncake" or (store == "auto" and config.ray.address is not None and across)):
            message, remedy = "no Mooncake store is used", "leave it out, or give pipeline.store=mooncake"
            return [Problem(field=f"mooncake.{name}", message=message, remedy=remedy) for name in names]
        return []
    return [Problem(field="pipeline.store", value=store, message=why, remedy="leave it at auto")]


def _offline_problems(config: RunConfig) -> list[Problem]:
    """No engine is loaded, so nothing may be said of one."""
    message, remedy = "no engine is loaded with pipeline.topology=offline", "leave it out"
    found = [Problem(field=f"engine.{name}", message=message, remedy=remedy) for name in given(config.engine)]
    if config.target.tensor_parallel > 1:
        value = config.target.tensor_parallel
        found.append(Problem(field="target.tensor_parallel", value=value, message=message, remedy=remedy))
    if config.pipeline.features is None:
        message, remedy = "a directory of captured features is needed", "make one with `torchspec capture`"
        found.append(Problem(field="pipeline.features", message=message, remedy=remedy))
    return found
