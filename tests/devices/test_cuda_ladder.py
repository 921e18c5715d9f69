"""Which CUDA kernel runs what, and that its choice is told once."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchspec.devices._math_kernel import MathKernel
from torchspec.devices._tiles import Tile
from torchspec.devices.cuda.attention import AtenFlashKernel, EfficientKernel, Ladder

PLAIN = Tile(rows=slice(0, 5), keys=slice(0, 5))
MASKED = PLAIN._replace(keep_BQS=torch.ones(1, 5, 5, dtype=torch.bool))
HOPPER, CONSUMER, TURING = (9, 0), (8, 9), (7, 5)


def chosen(capability: tuple[int, int], dtype: torch.dtype, size: int, tile: Tile) -> str:
    ladder = Ladder([AtenFlashKernel(capability), EfficientKernel(), MathKernel()])
    return ladder._choose(torch.empty(1, 5, 2, size, dtype=dtype), tile).name


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "tile", "kernel"),
    [
        (HOPPER, torch.bfloat16, 128, PLAIN, "flash"),
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


def test_the_choice_is_logged_once_with_the_reasons(caplog: pytest.LogCaptureFixture) -> None:
    ladder = Ladder([AtenFlashKernel(HOPPER), EfficientKernel(), MathKernel()])
    q = torch.empty(1, 5, 2, 8, dtype=torch.float64)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            ladder._choose(q, PLAIN)
    assert [record.getMessage() for record in caplog.records] == [
        "attention of torch.float64, head size 8 runs on math (flash: no torch.float64; efficient: no torch.float64)"
    ]


def test_long_causal_tiles_only_where_the_kernel_takes_them() -> None:
    ladder = Ladder([AtenFlashKernel(HOPPER), EfficientKernel(), MathKernel()])
    rows = [ladder.ramp_rows(torch.empty(1, 5, 2, 8, dtype=d)) for d in (torch.bfloat16, torch.float32)]
    assert rows == [None, 256]


@pytest.mark.parametrize("tile", [PLAIN, MASKED, PLAIN._replace(causal=True)], ids=["plain", "masked", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_operators_shape_functions_accept_the_calls(tile: Tile, dtype: torch.dtype) -> None:
    """PyTorch's shape functions of the CUDA operators: names, order and types of arguments, shapes of results."""
    kernel = EfficientKernel() if dtype == torch.float32 or tile.keep_BQS is not None else AtenFlashKernel(HOPPER)
    tile = tile._replace(keep_BQS=None if tile.keep_BQS is None else tile.keep_BQS.to("meta"))
    q = torch.empty(2, 5, 8, 64, device="meta", dtype=dtype)
    k = torch.empty(2, 5, 2, 64, device="meta", dtype=dtype)
    out, lse = kernel.forward(q, k, k, tile, 0.1)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == ((2, 8, 5), torch.float32)
    grads = kernel.backward(out, q, k, k, out, lse, tile, 0.1)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_a_broken_flash_attn_is_named_and_not_used(tmp_path: Path) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from torchspec.devices.cuda.attention import ladder\n"
        "print([rung.name for rung in ladder((9, 0))._rungs])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "['flash', 'efficient', 'math']", result.stderr
    assert "flash-attn is installed but does not load" in result.stderr
    assert "undefined symbol: _ZN3c10" in result.stderr
