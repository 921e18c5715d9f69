"""Attention implementations under test: every registered device, and rungs that can be exercised without hardware."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from torchspec.core.interfaces.device import Attention
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.registry import devices, load_device
from torchspec.devices._math_kernel import MathKernel
from torchspec.devices._tiled_attention import TiledAttention


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An attention implementation and the device its tensors live on."""

    attention: Attention
    device: torch.device


def available_device(name: str) -> torch.device:
    """Binds the registered device `name`, or skips with its probe's reason."""
    availability = devices().spec(name).probe()
    if not availability.ok:
        pytest.skip(f"{name}: {availability.reason}")
    return load_device(name).runtime.bind(0)


EMULATED = ["cuda_fa3", "cuda_fa2", "cuda_flash", "cuda_cudnn"]
"""The CUDA ladder on the CPU, over emulations of its kernels, with this rung first."""


@pytest.fixture(params=["cpu", "math", *EMULATED, "npu_emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "math":
        yield Subject(attention=TiledAttention(MathKernel(), temporary_bytes=1 << 20), device=torch.device("cpu"))
    elif request.param in EMULATED:
        emulation = request.getfixturevalue("cuda_emulation")
        with emulation.installed():
            ladder = emulation.ladder(request.param.removeprefix("cuda_"))
            yield Subject(attention=TiledAttention(ladder, temporary_bytes=1 << 20), device=torch.device("cpu"))
    elif request.param == "npu_emulated":
        yield request.getfixturevalue(request.param)
    else:
        device = available_device(request.param)
        yield Subject(attention=load_device(request.param).attention, device=device)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_name(request: pytest.FixtureRequest) -> str:
    available_device(request.param)
    return request.param


@pytest.fixture(scope="session")
def cuda_emulation() -> ModuleType:
    """cuda_emulation.py."""
    path = Path(__file__).parent / "cuda_emulation.py"
    spec = importlib.util.spec_from_file_location("cuda_emulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def npu_emulation() -> ModuleType:
    """ascend/emulation.py."""
    path = Path(__file__).parent / "ascend" / "emulation.py"
    spec = importlib.util.spec_from_file_location("emulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["emulation"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def npu_emulated(npu_emulation: ModuleType) -> Iterator[Subject]:
    """The Ascend adapter's attention on the CPU, over emulations of torch_npu's operators."""
    from torchspec.devices.ascend.attention import AscendKernel

    with npu_emulation.installed():
        attention = TiledAttention(AscendKernel(), temporary_bytes=1 << 20)
        q = torch.ones(1, 2, 1, 2)
        attention.forward(q, q, q, MaskSpec.causal(), 1.0)  # the one compressed mask of all causal tiles is made here
        yield Subject(attention=attention, device=torch.device("cpu"))
