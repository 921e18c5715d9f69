"""A Domino draft on a tiny target, in the world of tests/core/algorithms/blocks, whose correction says something."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BLOCKS = Path(__file__).parents[1] / "blocks"


def from_blocks(name: str) -> Any:
    """A module of the tests of blocks."""
    key = f"blocks_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, BLOCKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


shared = from_blocks("conftest")
cpu, make_blocks = shared.cpu, shared.make_world


@pytest.fixture(scope="session")
def oracle_of_blocks() -> Any:
    return from_blocks("test_oracle")


@pytest.fixture
def make_world(make_world_of_blocks: Callable[..., Any]) -> Callable[..., Any]:
    """make_world(**options): a fresh draft corrects nothing, this one does."""

    def make(**options: Any) -> Any:
        world = make_world_of_blocks("domino", **({"gru_hidden_dim": 10, "emb_dim": 6} | options))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for name, parameter in world.draft.named_parameters():
                if name.startswith(("prefix_gru", "embed_proj")):
                    values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(0.4 * values)
        return world

    return make


@pytest.fixture
def make_world_of_blocks(tiny_llama: Path, tmp_path: Path, cpu: Any) -> Callable[..., Any]:
    made: Callable[..., Any] = make_blocks.__wrapped__(tiny_llama, tmp_path, cpu)
    return made
