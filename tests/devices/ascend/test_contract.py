"""The adapter's calls of torch_npu against what was recorded of each published version: operators' schemas, and the
signatures of Python functions."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.devices._math_kernel import MathKernel
from torchspec.devices._tiles import Tile
from torchspec.devices.ascend.attention import AscendKernel
from torchspec.devices.ascend.ops import AscendOps

ROOT = Path(__file__).resolve().parents[3]
ADAPTER = ROOT / "devices" / "ascend"
VERSIONS = ("2.10.0.post7", "2.13.0", "2.14.0")

ROWS, KEYS = slice(0, 6), slice(0, 9)
TILES = {
    "full": Tile(rows=ROWS, keys=KEYS),
    "causal": Tile(rows=ROWS, keys=KEYS, causal=True),
    "window": Tile(rows=ROWS, keys=KEYS, causal=True, window=2),
    "masked": Tile(
        rows=ROWS, keys=KEYS, keep_BQS=torch.arange(54).view(1, 6, 9) % 5 < 2, may_have_empty_rows=True
    ),
    "documents": Tile(rows=ROWS, keys=KEYS, row_cuts=(0, 2, 6), key_cuts=(0, 5, 9)),
    "causal documents": Tile(rows=ROWS, keys=KEYS, causal=True, row_cuts=(0, 2, 6), key_cuts=(0, 5, 9)),
}  # fmt: skip


@pytest.fixture(params=VERSIONS)
def recorded(request: pytest.FixtureRequest, npu_emulation: ModuleType) -> Iterator[dict[str, Any]]:
    with npu_emulation.installed(request.param):
        yield npu_emulation.recorded(request.param)


def test_every_recorded_version_is_tested(npu_emulation: ModuleType) -> None:
    assert npu_emulation.VERSIONS == VERSIONS


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_every_tile_goes_through_the_schemas(recorded: dict[str, Any]) -> None:
    q, k, v, dout = tensors((2, 6, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), (2, 6, 4, 8))
    for name, tile in TILES.items():
        kernel = AscendKernel()
        out, lse = kernel.forward(q, k, v, tile, 0.3)
        grads = kernel.backward(dout, q, k, v, out, lse, tile, 0.3)
        assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)], name
        assert lse.shape == (2, 4, 6), name
    exact = MathKernel().forward(q, k, v, TILES["causal"], 0.3)
    for got, want in zip(AscendKernel().forward(q, k, v, TILES["causal"], 0.3), exact, strict=True):
        torch.testing.assert_close(got, want)


def test_every_operation_goes_through_the_schemas(recorded: dict[str, Any]) -> None:
    x, dy, cos = tensors((2, 3, 8), (2, 3, 8), (1, 3, 4))
    weight, x_BSHD = torch.ones(8), x.view(2, 3, 2, 4)
    ops = AscendOps()
    y, kept = ops.rms_norm(x, weight, 1e-6)
    assert [each.shape for each in (y, *ops.rms_norm_backward(dy, x, weight, kept))] == [x.shape, x.shape, weight.shape]
    assert ops.rotary(x_BSHD, cos, cos).shape == x_BSHD.shape
    assert {each.shape for each in (ops.swiglu(x, dy), *ops.swiglu_backward(dy, x, dy))} == {x.shape}


def test_a_wrong_keyword_or_type_does_not_pass(recorded: dict[str, Any]) -> None:
    q = torch.ones(1, 2, 1, 8)
    good = {"head_num": 1, "input_layout": "BSND"}
    assert len(torch.ops.npu.npu_fusion_attention(q, q, q, **good)) == 7
    for wrong in ({"attn_mask": None}, {"scale": "0.3"}, {"pre_tokens": 1}, {"actual_seq_qlen": torch.tensor([2.5])}):
        with pytest.raises((RuntimeError, TypeError)):
            torch.ops.npu.npu_fusion_attention(q, q, q, **good, **wrong)
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.npu.npu_fusion_attention_grad(q, q, q, q, **good, scale=0.3)  # scale_value there


def test_the_emulation_has_nothing_but_the_recorded_operators(recorded: dict[str, Any]) -> None:
    called = {
        node.attr
        for node in ast.walk(parsed(ADAPTER / "_ops.py"))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops.npu"
    }
    assert called == {text.partition("(")[0] for text in recorded["operators"]}


def test_one_module_calls_torch_npu() -> None:
    """By any name: the operators, the package, its parts of torch."""
    found = {
        path.name
        for path in (ROOT / "devices").rglob("*.py")
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.ops.npu", "torch.npu"))
        or (isinstance(node, ast.Call) and "torch_npu" in ast.unparse(node) and "import_module" in ast.unparse(node))
        or (isinstance(node, ast.Import | ast.ImportFrom) and "torch_npu" in ast.unparse(node))
    }
    assert found == {"_ops.py"}


def test_python_functions_take_what_they_are_given(recorded: dict[str, Any]) -> None:
    runtime = recorded["python"]["torch_npu.npu"]
    calls = list(calls_of(ROOT / "devices" / "_torch_runtime.py", "module", "self._module"))
    assert {"device_count", "set_device", "mem_get_info", "stream", "Stream"} <= {name for name, _ in calls}
    for name, call in calls:
        fits(call, runtime[name])
    signature_of(runtime["Stream"]["record_event"]).bind(None)
    signature_of(runtime["Stream"]["wait_event"]).bind(None, None)
    for name in ("_is_in_bad_fork", "manual_seed_all", "get_device_name"):
        assert name in runtime, "torch.manual_seed looks for the first two, and a run's facts have the name"
    profiler = recorded["python"]["torch_npu.profiler"]
    calls = list(calls_of(ADAPTER / "_ops.py", "profiler"))
    assert {name for name, _ in calls} == {"profile", "tensorboard_trace_handler"}
    for name, call in calls:
        fits(call, profiler[name])
    assert {"__enter__", "__exit__"} <= profiler["profile"].keys()
    assert profiler["ProfilerActivity"].startswith("of torch_npu._C")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def calls_of(path: Path, *owners: str) -> Iterator[tuple[str, ast.Call]]:
    """(name, call) of what is called of these names."""
    for node in ast.walk(parsed(path)):
        attribute = node.func if isinstance(node, ast.Call) else None
        if isinstance(attribute, ast.Attribute) and ast.unparse(attribute.value) in owners:
            yield attribute.attr, node


def fits(call: ast.Call, taken: str | dict[str, str]) -> None:
    """TypeError where recorded parameters do not take the call's arguments."""
    if isinstance(taken, dict):
        made = "__init__" if "__init__" in taken else "__new__"
        signature, owner = signature_of(taken[made]), [None]
    else:
        signature, owner = signature_of(taken), []
    signature.bind(*owner, *call.args, **{str(each.arg): None for each in call.keywords})


def signature_of(parameters: str) -> inspect.Signature:
    space: dict[str, Any] = {}
    exec(f"def function({parameters}): ...", space)
    return inspect.signature(space["function"])
