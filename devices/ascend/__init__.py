"""Huawei Ascend NPUs, registered as `npu`. The adapter is not part of this release; the probe says what it found.

Nothing of the vendor is imported here, not even to look: with torch_npu installed and CANN absent, importing torch_npu
fails halfway and leaves torch changed.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
from pathlib import Path

from torchspec.devices.api import Availability, Device, DeviceSpec, UnavailableError

HINT = "name another device with --device (`torchspec doctor` lists what is available here)"
_CANN_LIBRARIES = ("ascendcl", "hccl")
_DEVICE_NODES = Path("/dev")


def _probe() -> Availability:
    return Availability(ok=False, reason=f"the Ascend adapter is not part of this release ({_found()})", hint=HINT)


def _load() -> Device:
    raise UnavailableError(f"device 'npu' cannot be loaded: {_probe().reason}\n    remedy: {HINT}")


def _found() -> str:
    """What of the vendor's stack is on this machine: NPUs, torch_npu, and the CANN libraries it would load."""
    nodes = sorted(_DEVICE_NODES.glob("davinci[0-9]*"))
    npus = f"{len(nodes)} NPU{'s' if len(nodes) != 1 else ''} under /dev" if nodes else "no NPU under /dev"
    if importlib.util.find_spec("torch_npu") is None:
        return f"{npus}; torch_npu is not installed"
    try:
        version = importlib.metadata.version("torch-npu")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    missing = [f"lib{name}.so" for name in _CANN_LIBRARIES if ctypes.util.find_library(name) is None]
    cann = f"CANN's {', '.join(missing)} not found" if missing else "CANN found"
    return f"{npus}; torch_npu {version}; {cann}"


SPEC = DeviceSpec(name="npu", device_type="npu", probe=_probe, load=_load, capabilities=frozenset())
