"""A check of the device's module of PyTorch (torch.cuda, torch.npu, ...): every name that somebody will ask it for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchspec.core.conformance.checks import Check
from torchspec.devices.conformance.subject import Subject
from torchspec.devices.parts import TorchRuntime

_ALWAYS = {
    "core": ("get_device_name", "device_count", "Event"),
    "torch.manual_seed": ("manual_seed_all", "_is_in_bad_fork"),
    "torch.random.fork_rng": ("get_rng_state", "set_rng_state"),
    "DeviceMesh": ("is_initialized", "is_available", "device_count", "set_device"),
    "FSDP2": ("current_device", "current_stream", "stream", "Stream", "Event"),
}
_OF_RUNTIME = {
    "device_count": ("device_count",),
    "bind": ("set_device",),
    "synchronize": ("synchronize",),
    "memory": ("mem_get_info", "memory_allocated", "max_memory_allocated"),
    "reset_peak_memory": ("reset_peak_memory_stats",),
    "limit_memory": ("set_per_process_memory_fraction",),
    "rng_state": ("get_rng_state",),
    "set_rng_state": ("set_rng_state",),
    "upload": ("set_device", "Stream", "stream", "current_stream"),
}
"""What each method of `TorchRuntime` calls: not asked for where an adapter has a method of its own."""


def lacking(runtime: object, module: object) -> dict[str, list[str]]:
    """The names that `module` has not, each with who will ask for it."""
    asked = dict(_ALWAYS)
    for method, names in _OF_RUNTIME.items():
        if getattr(type(runtime), method, None) is getattr(TorchRuntime, method):
            asked[f"TorchRuntime.{method}"] = names
    missing: dict[str, list[str]] = {}
    for who, names in asked.items():
        for name in names:
            if not callable(getattr(module, name, None)):
                missing.setdefault(name, []).append(who)
    return missing


def complete(subject: Subject) -> str:
    """All that is missing is named at once: the next name of one alone would be found by the next run."""
    where = subject.where
    if where.type == "cpu":
        return "none is asked for: the host has no streams"
    module = torch.get_device_module(where)
    missing = lacking(subject.device.runtime, module)
    faults = [f"{name} ({', '.join(who)})" for name, who in missing.items()]
    for what, use in _uses(module, where).items():
        try:
            use()
        except Exception as error:  # an adapter may fail in any way; that is a result  # noqa: BLE001
            faults.append(f"{what} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
    assert not faults, f"torch.{where.type} lacks " + "; ".join(faults)
    return f"{len({name for names in (*_ALWAYS.values(), *_OF_RUNTIME.values()) for name in names})} names"


def _uses(module: Any, where: torch.device) -> dict[str, Callable[[], None]]:
    """What has to work besides being there, by the words that one would look it up with."""

    def timing() -> None:
        before, after = (torch.Event(device=where, enable_timing=True) for _ in range(2))
        before.record()
        torch.ones(8, device=where)
        after.record()
        after.synchronize()
        milliseconds = before.elapsed_time(after)
        assert milliseconds >= 0, f"{milliseconds} ms have passed"

    def waiting() -> None:
        side = module.Stream(priority=-1)
        with module.stream(side):
            made = torch.ones(8, device=where)
            done = side.record_event()
        current = module.current_stream()
        current.wait_event(done)
        made.record_stream(current)
        side.wait_stream(current)
        module.Event().record()
        assert made.sum().item() == 8

    def pinning() -> None:
        assert torch.ones(8).pin_memory().is_pinned(), "it is not pinned"

    def naming() -> None:
        assert str(module.get_device_name(where)), "it has no name"

    return {
        "torch.Event(enable_timing=True).elapsed_time": timing,
        "Stream(priority=) with record_event, wait_event, wait_stream and Tensor.record_stream": waiting,
        "Tensor.pin_memory": pinning,
        "torch.accelerator.synchronize": lambda: torch.accelerator.synchronize(where),
        "get_device_name": naming,
    }


MODULE = (Check("runtime: its module", complete),)
