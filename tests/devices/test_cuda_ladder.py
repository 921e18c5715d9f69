"""Which CUDA kernel runs what, that its choice is told once, and what it is when the user makes it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from torchspec.core.settings import attention_kernels
from torchspec.devices._tiles import Tile
from torchspec.devices.api import UnavailableError
from torchspec.devices.cuda.attention import Ladder, ladder
from torchspec.devices.cuda.attention.cudnn import CudnnKernel
from torchspec.devices.cuda.attention.efficient import EfficientKernel
from torchspec.devices.cuda.attention.flash import AtenFlashKernel

PLAIN = Tile(rows=slice(0, 5), keys=slice(0, 5))
MASKED = PLAIN._replace(keep_BQS=torch.ones(1, 5, 5, dtype=torch.bool))
CAUSAL = PLAIN._replace(causal=True)
RAMP = CAUSAL._replace(rows=slice(2, 5))
WINDOW = CAUSAL._replace(window=2)
DOCUMENTS = CAUSAL._replace(row_cuts=(0, 2, 5), key_cuts=(0, 2, 5))
TILES = {"plain": PLAIN, "masked": MASKED, "causal": CAUSAL, "window": WINDOW, "documents": DOCUMENTS}
HOPPER, BLACKWELL, AMPERE, CONSUMER, TURING = (9, 0), (10, 0), (8, 0), (8, 9), (7, 5)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, cuda_emulation: ModuleType) -> None:
    """Both flash-attn packages, as far as anyone who imports them can tell."""
    stand_ins = {"flash_attn_interface": cuda_emulation.FA3, "flash_attn.flash_attn_interface": cuda_emulation.FA2}
    for name, functions in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(vars(functions))
        root = ModuleType(name.partition(".")[0]) if "." in name else module
        root.__spec__ = importlib.machinery.ModuleSpec(root.__name__, None)
        monkeypatch.setitem(sys.modules, root.__name__, root)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "flash_attn" in name else find(name))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def chosen(capability: tuple[int, int], dtype: torch.dtype, size: int, tile: Tile, *names: str) -> str:
    return ladder(capability, names)._choose(torch.empty(1, 5, 2, size, dtype=dtype), tile).name


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize(
    ("capability", "dtype", "size", "tile", "kernel"),
    [
        (HOPPER, torch.bfloat16, 128, PLAIN, "flash"),
        (HOPPER, torch.bfloat16, 128, WINDOW, "flash"),
        (HOPPER, torch.bfloat16, 128, DOCUMENTS, "flash"),
        (HOPPER, torch.float16, 256, PLAIN, "flash"),
        (HOPPER, torch.bfloat16, 128, MASKED, "efficient"),
        (HOPPER, torch.bfloat16, 264, PLAIN, "efficient"),
        (HOPPER, torch.bfloat16, 20, PLAIN, "math"),
        (HOPPER, torch.float32, 128, PLAIN, "efficient"),
        (HOPPER, torch.float64, 128, PLAIN, "math"),
        (HOPPER, torch.float64, 128, MASKED, "math"),
        (CONSUMER, torch.bfloat16, 192, PLAIN, "flash"),
        (CONSUMER, torch.bfloat16, 256, PLAIN, "efficient"),
        (TURING, torch.float16, 64, PLAIN, "efficient"),
    ],
)
def test_the_first_kernel_that_supports_a_tile(
    capability: tuple[int, int], dtype: torch.dtype, size: int, tile: Tile, kernel: str
) -> None:
    assert chosen(capability, dtype, size, tile) == kernel


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("capability", "dtype", "tile", "kernel"),
    [
        (HOPPER, torch.bfloat16, PLAIN, "fa3"),
        (HOPPER, torch.bfloat16, DOCUMENTS, "fa3"),
        (HOPPER, torch.bfloat16, MASKED, "efficient"),
        (HOPPER, torch.float32, PLAIN, "efficient"),
        (BLACKWELL, torch.bfloat16, WINDOW, "fa2"),
        (AMPERE, torch.float16, PLAIN, "fa2"),
        (TURING, torch.float16, PLAIN, "efficient"),
    ],
)
def test_with_the_packages(capability: tuple[int, int], dtype: torch.dtype, tile: Tile, kernel: str) -> None:
    assert chosen(capability, dtype, 64, tile) == kernel


@pytest.mark.usefixtures("no_packages")
def test_the_choice_is_logged_once_with_the_reasons(caplog: pytest.LogCaptureFixture) -> None:
    kernels = ladder(TURING)
    q = torch.empty(1, 5, 2, 8, dtype=torch.float64)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            kernels._choose(q, PLAIN)
    too_old = "needs compute capability 8.0, this GPU has 7.5"
    assert [record.getMessage() for record in caplog.records] == [
        "attention of torch.float64, head size 8 runs on math (fa3: is not installed; fa2: is not installed; "
        f"flash: {too_old}; cudnn: {too_old}; efficient: no torch.float64)"
    ]


def test_tiles_are_planned_for_the_kernel_that_will_take_them() -> None:
    kernels = ladder(HOPPER, ["flash", "efficient", "math"])
    takes = [kernels.takes(torch.empty(1, 5, 2, 8, dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float64)]
    assert takes == [(None, True, True), (256, False, False), (None, True, True)]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("names", "kernel"), [(["fa2"], "fa2"), (["math", "fa3"], "math"), (["cudnn"], "cudnn")])
def test_who_names_kernels_gets_them_alone(names: list[str], kernel: str) -> None:
    assert chosen(HOPPER, torch.bfloat16, 64, CAUSAL, *names) == kernel


@pytest.mark.parametrize(
    ("names", "tile", "dtype", "reason"),
    [
        (["flash"], MASKED, torch.bfloat16, "flash: no masks"),
        (["flash", "efficient"], PLAIN, torch.float64, r"flash: no torch.float64; efficient: no torch.float64"),
        (["cudnn"], DOCUMENTS, torch.bfloat16, "cudnn: no documents"),
        (["efficient"], WINDOW, torch.bfloat16, "efficient: no windows"),
        (["cudnn"], RAMP, torch.bfloat16, "cudnn: no causal tiles with more keys than rows"),
        (["cudnn"], PLAIN._replace(keys=slice(0, 1)), torch.bfloat16, "cudnn: no single keys"),
    ],
)
def test_what_the_named_kernels_cannot_run_is_an_error(
    names: list[str], tile: Tile, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(UnavailableError, match=f"^no kernel runs attention of .*{reason}"):
        chosen(HOPPER, dtype, 64, tile, *names)


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("fa2", HOPPER, "'fa2', asked for by name, is not installed"),
        ("flash", TURING, "'flash', asked for by name, needs compute capability 8.0, this GPU has 7.5"),
        ("fa4", HOPPER, "no attention kernel is called 'fa4': there are fa3, fa2, flash, cudnn, efficient, math"),
    ],
)
def test_a_named_kernel_that_cannot_be_had_is_never_replaced(
    name: str, capability: tuple[int, int], reason: str
) -> None:
    with pytest.raises(UnavailableError, match=reason):
        ladder(capability, ["math", name])


@pytest.mark.usefixtures("packages")
def test_the_hopper_package_elsewhere() -> None:
    with pytest.raises(UnavailableError, match=r"'fa3', .* needs compute capability 9.0, this GPU has 10.0"):
        ladder(BLACKWELL, ["fa3"])


def test_the_names_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHSPEC_ATTENTION", raising=False)
    assert attention_kernels() == ()
    monkeypatch.setenv("TORCHSPEC_ATTENTION", " fa2, math,")
    assert attention_kernels() == ("fa2", "math")


@pytest.mark.usefixtures("packages", "deterministic")
def test_kernels_that_cannot_repeat_their_gradients_refuse_when_they_must() -> None:
    assert chosen(HOPPER, torch.bfloat16, 64, CAUSAL) == "fa2"
    for name in ("fa3", "cudnn"):
        with pytest.raises(UnavailableError, match=f"{name}: not deterministic"):
            chosen(HOPPER, torch.bfloat16, 64, CAUSAL, name)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("tile", [CAUSAL, DOCUMENTS], ids=["causal", "documents"])
def test_the_package_is_told_to_be_deterministic(
    tile: Tile, cuda_emulation: ModuleType, request: pytest.FixtureRequest
) -> None:
    told = cuda_emulation.FA2.deterministic
    told.clear()
    kernels = ladder(HOPPER, ["fa2"])
    q = torch.randn(1, 5, 2, 8, dtype=torch.bfloat16)
    out, lse = kernels.forward(q, q, q, tile, 1.0)
    kernels.backward(q, q, q, q, out, lse, tile, 1.0)
    request.getfixturevalue("deterministic")
    kernels.backward(q, q, q, q, out, lse, tile, 1.0)
    assert told == [False, True]


def test_the_choice_follows_the_determinism_asked_for(request: pytest.FixtureRequest) -> None:
    kernels = Ladder([CudnnKernel(HOPPER), EfficientKernel(HOPPER)])
    q = torch.empty(1, 5, 2, 64, dtype=torch.bfloat16)
    assert kernels._choose(q, PLAIN).name == "cudnn"
    request.getfixturevalue("deterministic")
    assert kernels._choose(q, PLAIN).name == "efficient"


@pytest.mark.parametrize("axes", [3, 4])
def test_cudnn_gets_the_log_sum_exp_as_it_gave_it(axes: int, cuda_emulation: ModuleType) -> None:
    kernel = CudnnKernel(HOPPER)
    q = torch.randn(2, 5, 4, 8, dtype=torch.bfloat16)
    with cuda_emulation.installed():
        cuda_emulation.CUDNN.lse_axes = axes
        try:
            out, lse = kernel.forward(q, q[:, :, :2], q[:, :, :2], CAUSAL, 1.0)
            kernel.backward(q, q, q[:, :, :2], q[:, :, :2], out, lse, CAUSAL, 1.0)
        finally:
            cuda_emulation.CUDNN.lse_axes = 4
    assert lse.shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("kernel", "tile", "dtype"),
    [
        *(
            (AtenFlashKernel(HOPPER), TILES[each], torch.bfloat16)
            for each in ("plain", "causal", "window", "documents")
        ),
        *((EfficientKernel(HOPPER), TILES[each], torch.float32) for each in ("plain", "masked", "causal")),
        (EfficientKernel(HOPPER), MASKED, torch.bfloat16),
        *((CudnnKernel(HOPPER), TILES[each], torch.bfloat16) for each in ("plain", "causal")),
    ],
)
def test_the_operators_shape_functions_accept_the_calls(kernel, tile: Tile, dtype: torch.dtype) -> None:
    """PyTorch's shape functions of the CUDA operators: names, order and types of arguments, shapes of results."""
    tile = tile._replace(keep_BQS=None if tile.keep_BQS is None else tile.keep_BQS.to("meta"))
    q = torch.empty(2, 5, 8, 64, device="meta", dtype=dtype)
    k = torch.empty(2, 5, 2, 64, device="meta", dtype=dtype)
    out, lse = kernel.forward(q, k, k, tile, 0.1)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == ((2, 8, 5), torch.float32)
    assert lse.is_contiguous()
    grads = kernel.backward(out, q, k, k, out, lse, tile, 0.1)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


OLD = {
    "flash_attn": "def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap): ...",
    "flash_attn_interface": "def _flash_attn_forward(q, k, v, softmax_scale, causal, window_size=(-1, -1)): ...",
}


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("defect", ["broken", "old"])
def test_a_package_of_no_use_is_named_and_not_used(tmp_path: Path, package: str, defect: str) -> None:
    module = tmp_path / f"{package}.py" if package == "flash_attn_interface" else tmp_path / "flash_attn"
    if package == "flash_attn":
        module.mkdir()
        (module / "__init__.py").write_text("")
        module = module / "flash_attn_interface.py"
    module.write_text("raise ImportError('undefined symbol: _ZN3c10')" if defect == "broken" else OLD[package])
    code = (
        f"import logging, sys; sys.path.insert(0, {str(tmp_path)!r}); logging.basicConfig(level=logging.INFO)\n"
        "import torch\n"
        "from torchspec.devices.cuda.attention import ladder\n"
        "kernels = ladder((9, 0))\n"
        "print([rung.name for rung in kernels._rungs])\n"
        "kernels.takes(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "['flash', 'cudnn', 'efficient', 'math']", result.stderr
    if defect == "broken":
        assert "WARNING" in result.stderr
        assert "is installed but does not load: undefined symbol: _ZN3c10" in result.stderr
    else:
        assert "WARNING" not in result.stderr
        assert "is another version: " in result.stderr
        assert "._flash_attn_forward has no parameter" in result.stderr
