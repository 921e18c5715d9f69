"""NVIDIA GPUs through CUDA and NCCL.

What was run, all of it on the CPU: the tile planning and the sums over tiles (shared with the CPU), the ladder's
choices, the math rung; the calls to PyTorch's CUDA attention operators, against emulations of what their sources say,
registered under the operators' real schemas, and against the operators' own shape functions; the calls to the
flash-attn and flash-attn-3 packages, against stand-ins with their published signatures; the calls to PyTorch's product
of FP8 matrices, by the same operator for CPUs; the Triton kernel of the distillation loss, in Triton's interpreter.
That kernel was also compiled to machine code for three generations of GPUs.

What was not run: any CUDA kernel, this one included, the flash-attn packages themselves, NCCL, device memory or random
state. Which attention kernel is fastest is therefore the field's word, not a measurement; benchmarks/attention.py takes
it. tests/devices runs all of it where a GPU is present (marker `gpu`).
"""

from __future__ import annotations

import warnings

import torch

from torchspec.devices.api import Availability, Device, DeviceSpec, attention_kernels


def _probe() -> Availability:
    if torch.version.cuda is None:
        return Availability(
            ok=False,
            reason=f"this PyTorch ({torch.__version__}) is built without CUDA",
            hint="install a CUDA build of PyTorch: https://pytorch.org/get-started/locally",
        )
    with warnings.catch_warnings(record=True) as caught:  # PyTorch tells why CUDA cannot start as a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        cause = "; ".join(str(warning.message).strip() for warning in caught) or "no usable GPU was found"
        return Availability(
            ok=False,
            reason=f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}, but {cause}",
            hint="`nvidia-smi` must list a GPU with a driver for this CUDA version, and CUDA_VISIBLE_DEVICES must not "
            "hide it",
        )
    return Availability(ok=True)


def _load() -> Device:
    from torchspec.devices._collectives import TorchCommunication
    from torchspec.devices._tiled_attention import TiledAttention
    from torchspec.devices._torch_runtime import TorchRuntime
    from torchspec.devices.cuda.attention import ladder
    from torchspec.devices.cuda.ipc import CudaSharedMemory
    from torchspec.devices.cuda.mps import CudaMps
    from torchspec.devices.cuda.ops import CudaOps

    return Device(
        name="cuda",
        runtime=TorchRuntime(
            "cuda",
            visible_devices_variable="CUDA_VISIBLE_DEVICES",
            allocator_variable="PYTORCH_CUDA_ALLOC_CONF",
            ray_resource="GPU",
        ),
        communication=TorchCommunication("cpu:gloo,cuda:nccl", splits=True),
        attention=TiledAttention(
            ladder(torch.cuda.get_device_capability(), attention_kernels()), temporary_bytes=256 << 20
        ),
        ops=CudaOps(),
        shared_memory=CudaSharedMemory(),
        multiplexer=CudaMps(),
    )


SPEC = DeviceSpec(
    name="cuda",
    device_type="cuda",
    probe=_probe,
    load=_load,
    capabilities=frozenset({"bf16", "fp16", "fp64", "fp8", "ipc", "compile"}),
)
