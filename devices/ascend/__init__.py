"""Huawei Ascend NPUs through torch_npu, CANN and HCCL, registered as `npu`. Contract-tested, not verified on hardware.

What was run: this whole adapter on CPU emulations of the vendor's operators, which have the schemas recorded of
published torch_npu wheels and behave as the vendor documents, among them attention against its definition and training
runs of two processes; the calls of torch_npu's Python functions, against their recorded signatures. What was not run:
anything of CANN, HCCL or an NPU. docs/ascend.md lists what only hardware can show, each with its command.

Nothing of the vendor is imported here, not even to look: with torch_npu installed and CANN absent, importing torch_npu
fails halfway and leaves torch changed.

There is no `shared_memory`: memory of an NPU is opened by other processes through compiled functions of torch_npu that
are not documented, and only with drivers of 2025 and later, so features are handed over in the host's memory.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from torchspec.devices.api import Availability, Device, DeviceSpec

HINT = "docs/ascend.md says what has to be installed; `torchspec doctor` lists the devices that are available here"
_CANN_LIBRARIES = ("ascendcl", "hccl")
_DEVICE_NODES = Path("/dev")


def _probe() -> Availability:
    found, wrong = _looked()
    if wrong:
        return Availability(ok=False, reason="; ".join((*found, *wrong)), hint=HINT)
    return Availability(ok=True, reason="; ".join(found))


def _load() -> Device:
    from torchspec.devices._tiled_attention import TiledAttention
    from torchspec.devices.ascend import _ops
    from torchspec.devices.ascend.attention import AscendKernel
    from torchspec.devices.ascend.communication import HcclCommunication
    from torchspec.devices.ascend.ops import AscendOps
    from torchspec.devices.ascend.runtime import AscendRuntime

    _ops.start()
    return Device(
        name="npu",
        runtime=AscendRuntime(),
        communication=HcclCommunication(),
        attention=TiledAttention(AscendKernel(), temporary_bytes=AscendOps.temporary_bytes),
        ops=AscendOps(),
    )


def _looked() -> tuple[list[str], list[str]]:
    """What of the vendor's stack is on this machine, and what is missing or does not fit."""
    found, wrong = [], []
    nodes = sorted(_DEVICE_NODES.glob("davinci[0-9]*"))
    if nodes:
        found.append(f"{len(nodes)} NPU{'s' if len(nodes) != 1 else ''} under {_DEVICE_NODES}")
    else:
        wrong.append(f"no NPU under {_DEVICE_NODES}")
    if importlib.util.find_spec("torch_npu") is None:
        return found, [*wrong, "torch_npu is not installed"]
    version = _version("torch-npu")
    found.append(f"torch_npu {version or 'of unknown version'}")
    if version and _minor(version) != _minor(torch.__version__):
        wrong.append(f"torch {torch.__version__} is not the one it was built for")
    if torch.version.cuda is not None:
        wrong.append("this torch is built with CUDA, beside which torch_npu does not load")
    missing = [name for name in _CANN_LIBRARIES if not _loads(f"lib{name}.so")]
    if missing:
        wrong.append(f"CANN's {', '.join(f'lib{name}.so' for name in missing)} not found: source its set_env.sh")
    else:
        found.append("CANN found")
    return found, wrong


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _loads(library: str) -> bool:
    """Whether the loader finds it, as it will for torch_npu: LD_LIBRARY_PATH counts as it was when Python started."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


SPEC = DeviceSpec(
    name="npu",
    device_type="npu",
    probe=_probe,
    load=_load,
    capabilities=frozenset({"bf16", "fp16"}),
)
