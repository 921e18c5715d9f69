"""Specs are light and their probes honest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchspec.core.errors import UnavailableError
from torchspec.core.interfaces.device import API_VERSION
from torchspec.core.registry import devices, load_device

VENDOR_MODULES = ("torch_npu", "flash_attn", "flash_attn_2_cuda", "triton", "sglang", "vllm", "mooncake")
LISTING = """
import sys
from torchspec.core.registry import devices
for name in devices().names():
    devices().spec(name).probe()
print(*sys.modules, sep="\\n")
"""


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    prefix = "".join(f"import sys; sys.path.insert(0, {str(p)!r})\n" for p in path)
    return subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True, timeout=120)


def test_specs_and_probes_import_no_vendor_and_no_adapter() -> None:
    result = run(LISTING)
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split()
    assert "torchspec.devices.cpu" in loaded
    assert "torchspec.devices.ascend" in loaded
    roots = {name.partition(".")[0] for name in loaded}
    assert not roots & set(VENDOR_MODULES)
    adapters = [f"torchspec.devices.{name}" for name in ("cpu.attention", "cuda.attention", "_collectives")]
    assert not set(adapters) & set(loaded)


@pytest.mark.parametrize("name", ["cpu", "cuda", "npu"])
def test_built_in_specs(name: str) -> None:
    spec = devices().spec(name)
    assert (spec.name, spec.device_type, spec.api_version) == (name, name, API_VERSION)
    availability = spec.probe()
    assert availability.ok or (availability.reason and availability.hint)


def test_cpu_is_always_available() -> None:
    device = load_device("cpu")
    assert device.name == "cpu"
    assert device.runtime.bind(3) == torch.device("cpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built with CUDA")
def test_cuda_names_what_is_missing() -> None:
    with pytest.raises(UnavailableError, match=r"'cuda' is not available here: this PyTorch .* is built without CUDA"):
        load_device("cuda")


@pytest.mark.skipif(devices().spec("npu").probe().ok, reason="an NPU is here")
def test_npu_says_what_is_missing() -> None:
    with pytest.raises(UnavailableError, match=r"'npu' is not available here: .*(no NPU|not installed|not found)"):
        load_device("npu")


def test_npu_probe_looks_at_torch_npu_without_importing_it(tmp_path: Path) -> None:
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    code = "from torchspec.core.registry import devices\nprint(devices().spec('npu').probe().reason)"
    result = run("import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\n" + code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "torch_npu of unknown version" in result.stdout
    assert "CANN" in result.stdout


def test_npu_probe_reads_the_installed_version(tmp_path: Path) -> None:
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "torch_npu-2.13.0.dist-info").mkdir()
    (tmp_path / "torch_npu-2.13.0.dist-info" / "METADATA").write_text("Name: torch-npu\nVersion: 2.13.0\n")
    result = run("from torchspec.core.registry import devices\nprint(devices().spec('npu').probe().reason)", tmp_path)
    assert "torch_npu 2.13.0" in result.stdout, result.stderr
