"""A device for torchspec that needs no hardware. What torchspec finds by its entry point is `SPEC`; it is light."""

from __future__ import annotations

from importlib.util import find_spec

from torchspec.devices.api import Availability, Device, DeviceSpec


def _probe() -> Availability:
    if find_spec("toyhw._C") is None:
        return Availability(
            ok=False,
            reason="its extension is not built",
            hint="pip install --no-build-isolation examples/torchspec-toyhw, with a C++ compiler",
        )
    return Availability(ok=True)


def _load() -> Device:
    from toyhw.device import device

    return device()


SPEC = DeviceSpec(
    name="toyhw",
    device_type="toyhw",
    probe=_probe,
    load=_load,
    capabilities=frozenset({"bf16", "fp16", "fp64", "ipc"}),
)
