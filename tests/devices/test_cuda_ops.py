"""The distillation tile of the CUDA adapter: the kernel's values and gradients, and which form runs when."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.core.ops.distillation import TilePairs, TileTeacher, TileTerms, distillation_tile
from torchspec.core.ops.fp8 import E4M3, E5M2, Scaling, scaled
from torchspec.core.registry import devices
from torchspec.devices.api import Fp8Support, emulated_scaled_mm
from torchspec.devices.cuda.ops import CudaOps

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distillation_worker.py")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (the test extra has it for Linux x86_64)",
)


def worker(mode: str, **variables: str) -> str:
    """Triton decides when it is imported whether it compiles or interprets: a process for each."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(WORKER), mode],
        capture_output=True,
        text=True,
        timeout=500,
        env=kept | {"OMP_NUM_THREADS": "1"} | variables,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def skip_without_gpu() -> None:
    availability = devices().spec("cuda").probe()
    if not availability.ok:
        pytest.skip(f"cuda: {availability.reason}")


@needs_triton
@pytest.mark.slow
def test_the_interpreted_kernel_equals_the_portable_form() -> None:
    if version("triton").startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 breaks on NumPy 2.4: it takes an array of one element for a number")
    assert re.search(r"\d\d cases, 0 failures", worker("cpu", TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.gpu
def test_the_kernel_equals_the_portable_form() -> None:
    skip_without_gpu()
    assert re.search(r"\d\d cases, 0 failures", worker("cuda"))


@needs_triton
def test_the_compiler_takes_the_kernel(tmp_path: Path) -> None:
    """For GPUs of three generations, none of which has to be here. Proves that it compiles, not what it computes."""
    assert worker("compile", TRITON_CACHE_DIR=str(tmp_path)).split() == ["sm_75", "sm_80", "sm_90"]


def tile(dtype: torch.dtype) -> tuple[Tensor, TileTeacher, TilePairs]:
    generator = torch.Generator().manual_seed(0)
    probs_RN = torch.randn(3, 40, dtype=dtype, generator=generator).softmax(-1)
    pairs = TilePairs(row_C=torch.arange(3), runs=[(0, 3, 0)], weight={"cross_entropy": torch.ones(3, dtype=dtype)})
    return torch.randn(3, 40, dtype=dtype, generator=generator), TileTeacher(probs_RN=probs_RN), pairs


class Spy:
    """In the kernel's place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[bool] = []
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(distillation_tile=self.run))

    def run(self, logits_CN: Tensor, teacher: TileTeacher, pairs: TilePairs, *, with_grad: bool) -> TileTerms:
        self.calls.append(with_grad)
        return distillation_tile(logits_CN, teacher, pairs, with_grad=with_grad, temporary_bytes=1 << 20)


def assert_portable(ops: CudaOps, dtype: torch.dtype) -> None:
    logits_CN, teacher, pairs = tile(dtype)
    wanted_CN = logits_CN.clone()
    wanted = distillation_tile(wanted_CN, teacher, pairs, with_grad=True, temporary_bytes=1 << 20)
    got = ops.distillation_tile(logits_CN, teacher, pairs, with_grad=True)
    assert torch.equal(got.value["cross_entropy"], wanted.value["cross_entropy"])
    assert torch.equal(logits_CN, wanted_CN)


def test_the_adapter_has_these_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert isinstance(devices().spec("cuda").load().ops, CudaOps)


def test_fp32_logits_go_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, ops = Spy(monkeypatch), CudaOps()
    for with_grad in (True, False):
        ops.distillation_tile(*tile(torch.float32), with_grad=with_grad)
    assert spy.calls == [True, False]


def test_fp64_logits_and_separated_columns_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, ops = Spy(monkeypatch), CudaOps()
    assert_portable(ops, torch.float64)
    logits_CN, teacher, pairs = tile(torch.float32)
    ops.distillation_tile(logits_CN.T.contiguous().T, teacher, pairs, with_grad=True)
    assert spy.calls == []


def test_without_triton_the_portable_form_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ops = CudaOps()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert_portable(ops, torch.float32)
    (record,) = caplog.records
    assert (record.levelno, "Triton is not installed" in record.getMessage()) == (logging.INFO, True)


def test_a_broken_triton_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN4llvm")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", broken)
    assert_portable(CudaOps(), torch.float32)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "undefined symbol: _ZN4llvm" in record.getMessage()


def test_one_file_imports_triton() -> None:
    folders = ("core", "devices", "backends", "src")
    importing = [
        path.name
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import|from)\s+triton\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert importing == ["_distillation_triton.py"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_multiplied_without_a_wide_copy(dtype: torch.dtype) -> None:
    """By PyTorch's shape functions, for CUDA tensors without memory: which operator is called, and its result."""
    ops = CudaOps()
    with FakeTensorMode(), Products() as products:
        a, b = (torch.empty(shape, device="cuda", dtype=dtype) for shape in ((4, 8), (8, 5)))
        out = torch.empty(4, 5, device="cuda")
        assert ops.wide_operand(b) is b
        for product in (ops.wide_mm(a, b), ops.wide_mm(a, b, out), ops.wide_mm(a.float(), b)):
            assert (product.shape, product.dtype) == ((4, 5), torch.float32)
    assert products.called == ["aten.mm.dtype", "aten.mm.dtype_out", "aten.mm.default"]


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "mm" in str(func):
            self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def test_halves_on_the_cpu_are_multiplied_in_fp32() -> None:
    a, b = torch.randn(4, 8).bfloat16(), torch.randn(8, 5).bfloat16()
    ops = CudaOps()
    torch.testing.assert_close(ops.wide_mm(a, ops.wide_operand(b)), a.float() @ b.float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wide_products_of_halves(dtype: torch.dtype) -> None:
    skip_without_gpu()
    ops = CudaOps()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in ((64, 1000), (1000, 48)))
    exact = a.double() @ b.double()
    out = torch.empty(64, 48, device="cuda")
    for product in (ops.wide_mm(a, ops.wide_operand(b)), ops.wide_mm(a, b.T.contiguous().T), ops.wide_mm(a, b, out)):
        assert product.dtype == torch.float32
        # Rounded to halves at the end, the product would be off by 4e-3 or 5e-4 of its size.
        torch.testing.assert_close(product.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())
    assert out is product


class Recorded:
    """`torch._scaled_mm`, which PyTorch has for CPUs too; how it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]] = []
        self._multiply = torch._scaled_mm
        monkeypatch.setattr(torch, "_scaled_mm", self)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    def __call__(self, a: Tensor, b: Tensor, **how: Any) -> Tensor:
        for matrix in (a, b.mT):
            assert matrix.is_contiguous(), "the layout that tensor cores read"
        assert how["scale_a"].is_contiguous()
        shapes = tuple(how["scale_a"].shape), tuple(how["scale_b"].shape)
        self.calls.append((*shapes, how["out_dtype"], how["use_fast_accum"]))
        return self._multiply(a, b, **how)


ONE, ROWS, COLUMNS = (1, 1), (5, 1), (1, 32)


@pytest.mark.parametrize(
    ("capability", "scaling", "dtype", "scales"),
    [
        ((9, 0), "row", torch.bfloat16, (ROWS, COLUMNS)),
        ((8, 9), "row", torch.bfloat16, (ROWS, COLUMNS)),
        ((9, 0), "row", torch.float32, (ONE, ONE)),
        ((12, 0), "row", torch.bfloat16, (ONE, ONE)),
        ((9, 0), "tensor", torch.bfloat16, (ONE, ONE)),
        ((12, 0), "tensor", torch.float32, (ONE, ONE)),
    ],
)
def test_fp8_products_by_the_kernels_that_a_gpu_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], scaling: Scaling, dtype: torch.dtype, scales: Any
) -> None:
    """Numbers are those of the emulation; tests/core/ops/test_fp8.py has them by definition."""
    recorded, ops = Recorded(monkeypatch, capability), CudaOps()
    assert ops.fp8 == Fp8Support(kind="native")
    x, y = torch.randn(5, 48), torch.randn(32, 48)
    operands = (scaled(x, E5M2, scaling, 1 << 20), scaled(y, E4M3, scaling, 1 << 20))
    product = ops.scaled_mm(*operands, dtype)
    torch.testing.assert_close(product, emulated_scaled_mm(*operands, dtype))
    assert recorded.calls == [(*scales, dtype, False)]


def test_fp8_is_emulated_where_a_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, ops = Recorded(monkeypatch, (8, 6)), CudaOps()
    assert ops.fp8.kind == "emulated"
    assert "8.6" in ops.fp8.reason
    assert "8.9" in ops.fp8.reason
    operand = scaled(torch.randn(16, 16), E4M3, "row", 1 << 20)
    assert torch.equal(
        ops.scaled_mm(operand, operand, torch.float32), emulated_scaled_mm(operand, operand, torch.float32)
    )
    assert not recorded.calls
