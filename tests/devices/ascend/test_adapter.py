"""What the adapter does apart from its calls: how it is found, when it leaves the vendor's operators, how it sends."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import distributed as dist

from torchspec.core.errors import UnavailableError
from torchspec.core.registry import devices
from torchspec.devices import ascend
from torchspec.devices._math_kernel import MathKernel
from torchspec.devices._tiles import Tile, TileKinds
from torchspec.devices.api import FusedOps
from torchspec.devices.ascend import _ops
from torchspec.devices.ascend import attention as ascend_attention
from torchspec.devices.ascend.attention import AscendKernel
from torchspec.devices.ascend.communication import BACKEND, HcclCommunication
from torchspec.devices.ascend.ops import AscendOps
from torchspec.devices.ascend.runtime import AscendRuntime


@pytest.fixture
def emulated(npu_emulation: ModuleType) -> Iterator[None]:
    with npu_emulation.installed():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("window", [None, 2])
def test_many_documents_are_given_in_several_calls(
    emulated: None, monkeypatch: pytest.MonkeyPatch, batch: int, window: int | None
) -> None:
    """The limit lies at 1,024; here at 4. Against a kernel that takes each document for itself."""
    monkeypatch.setattr(ascend_attention, "MOST_DOCUMENTS", 4)
    row_cuts, key_cuts = (0, 1, 4, 6, 9, 10, 12), (0, 3, 6, 9, 12, 14, 19)
    tile = Tile(rows=slice(0, 12), keys=slice(0, 19), causal=True, window=window, row_cuts=row_cuts, key_cuts=key_cuts)
    q, k, v, dout = (random(batch, rows, heads, 8) for rows, heads in ((12, 4), (19, 2), (19, 2), (12, 4)))
    kernel, each = AscendKernel(), AscendKernel()
    out, lse = kernel.forward(q, k, v, tile, 0.4)
    grads = kernel.backward(dout, q, k, v, out, lse, tile, 0.4)
    for rows, keys in tile.documents():
        alone = Tile(rows=rows, keys=keys, causal=True, window=window)
        part = (q[:, rows], k[:, keys], v[:, keys])
        own_out, own_lse = each.forward(*part, alone, 0.4)
        torch.testing.assert_close(out[:, rows], own_out)
        torch.testing.assert_close(lse[..., rows], own_lse)
        own = each.backward(dout[:, rows], *part, own_out, own_lse, alone, 0.4)
        for grad, wanted, places in zip(grads, own, (rows, keys, keys), strict=True):
            torch.testing.assert_close(grad[:, places], wanted)


@pytest.mark.parametrize(
    ("dtype", "heads", "size", "name"),
    [(torch.float64, 1, 8, "float64"), (torch.float32, 1, 769, "size 769"), (torch.float32, 257, 1, "257 heads")],
)
def test_what_the_operator_does_not_take_runs_as_products_and_is_told_once(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype, heads: int, size: int, name: str
) -> None:
    """Without any emulation: a call of the operator would fail."""
    q, dout = (random(1, 3, heads, size, dtype=dtype) for _ in range(2))
    tile = Tile(rows=slice(0, 3), keys=slice(0, 3), causal=True)
    kernel = AscendKernel()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert kernel.takes(q) == MathKernel().takes(q)
            out, lse = kernel.forward(q, q, q, tile, 0.4)
            kernel.backward(dout, q, q, q, out, lse, tile, 0.4)
    assert torch.equal(out, MathKernel().forward(q, q, q, tile, 0.4)[0])
    (record,) = caplog.records
    assert name in record.getMessage()


def test_other_queries_take_windows_and_documents() -> None:
    assert AscendKernel().takes(random(1, 3, 4, 8)) == TileKinds(windows=True, documents=True)


def test_one_compressed_mask_serves_all_causal_tiles(emulated: None) -> None:
    kernel = AscendKernel()
    for rows in (2, 5):
        q = random(1, rows, 1, 4)
        kernel.forward(q, q, q, Tile(rows=slice(0, rows), keys=slice(0, rows), causal=True), 0.4)
    (mask,) = kernel._triangles.values()
    assert mask.shape == (_ops.COMPRESSED, _ops.COMPRESSED)


def test_operations_that_the_vendor_has_not_are_plain() -> None:
    """Without any emulation."""
    plain, ops = FusedOps(), AscendOps()
    x, weight = random(2, 3, 8).bfloat16(), torch.ones(8)  # two dtypes
    for got, wanted in zip(ops.rms_norm(x, weight, 1e-6), plain.rms_norm(x, weight, 1e-6), strict=True):
        assert torch.equal(got, wanted)
    wide, angle = random(1, 2, 1, 4).double(), random(1, 2, 4).double()
    assert torch.equal(ops.rotary(wide, angle, angle), plain.rotary(wide, angle, angle))
    odd, turn = random(1, 2, 1, 896), random(1, 2, 896)
    assert torch.equal(ops.rotary(odd, turn, turn), plain.rotary(odd, turn, turn))
    assert torch.equal(ops.swiglu(wide, wide), plain.swiglu(wide, wide))
    for got, wanted in zip(
        ops.swiglu_backward(wide.clone(), wide, wide), plain.swiglu_backward(wide.clone(), wide, wide), strict=True
    ):
        assert torch.equal(got, wanted)


def test_what_is_moved_goes_as_words_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.dtype] = []
    exchange = dist.all_to_all_single

    def seen(received: torch.Tensor, given: torch.Tensor, *sizes: object, group: dist.ProcessGroup) -> object:
        sent.append(given.dtype)
        return exchange(received, given, *sizes, group=group)

    monkeypatch.setattr(dist, "all_to_all_single", seen)
    communication = HcclCommunication("gloo")
    communication.init(torch.device("cpu"), timedelta(seconds=30))
    group = dist.group.WORLD
    assert group is not None
    whole = torch.arange(24).view(4, 6)
    parts = {
        "bfloat16": whole.bfloat16(),
        "int64": whole,
        "a vector": whole[0],
        "no rows": whole[:0].half(),
        "off a word's edge": whole.bfloat16().view(-1)[1:13].view(2, 6),
        "half a word": whole[:, :3].bfloat16(),
        "a vector of halves": whole[0].half(),
    }
    for name, part in parts.items():
        for rows in (None, [len(part)]):
            (received,) = communication.all_to_all([part], group, rows)
            assert (received.dtype, received.shape) == (part.dtype, part.shape), name
            assert torch.equal(received, part), name
    dist.destroy_process_group()
    assert sent == [torch.float32] * 10 + [torch.bfloat16] * 2 + [torch.float16] * 2


def test_names_that_other_systems_know_it_by() -> None:
    runtime, spec = AscendRuntime(), devices().spec("npu")
    assert (runtime.device_type, runtime.ray_resource) == ("npu", "NPU")
    assert runtime.visible_devices_variable == "ASCEND_RT_VISIBLE_DEVICES"
    assert runtime.allocator_variable == "PYTORCH_NPU_ALLOC_CONF"
    assert BACKEND == "cpu:gloo,npu:hccl"
    assert spec.capabilities == {"bf16", "fp16"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the path with a torch_npu of this torch's version, never to be imported, beside two NPUs."""
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    version(tmp_path, torch.__version__.partition("+")[0])
    for node in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / node).touch()
    monkeypatch.setattr(ascend, "_DEVICE_NODES", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    return tmp_path


def version(folder: Path, number: str) -> None:
    info = folder / "torch_npu-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {number}\n")


def test_all_of_it_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend, "_loads", lambda library: library in ("libascendcl.so", "libhccl.so"))
    found = ascend.SPEC.probe()
    assert found.ok
    assert found.reason.startswith("2 NPUs under ")
    assert "CANN found" in found.reason
    assert "torch_npu" not in sys.modules


def test_each_missing_piece_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ascend.SPEC.probe()
    assert not found.ok
    assert "2 NPUs under " in found.reason
    assert "libascendcl.so, libhccl.so not found: source its set_env.sh" in found.reason
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert "this torch is built with CUDA" in ascend.SPEC.probe().reason
    version(here, "2.1.0")
    assert "is not the one it was built for" in ascend.SPEC.probe().reason
    for node in here.glob("davinci*"):
        node.unlink()
    assert "no NPU under " in ascend.SPEC.probe().reason
    assert "torch_npu" not in sys.modules


def test_a_torch_npu_that_does_not_import_is_an_error_for_people(tmp_path: Path) -> None:
    """In a process of its own, since it would stay imported."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from torchspec.core.registry import devices\n"
        "devices().spec('npu').load()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "UnavailableError: device 'npu' cannot be loaded: importing torch_npu failed: libhccl.so" in done.stderr
    assert "remedy: source CANN's set_env.sh" in done.stderr


@pytest.mark.skipif("torch_npu" in sys.modules, reason="torch_npu is here")
def test_without_torch_npu_loading_says_so() -> None:
    with pytest.raises(UnavailableError, match="importing torch_npu failed"):
        devices().spec("npu").load()
