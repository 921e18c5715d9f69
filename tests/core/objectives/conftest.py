"""Target heads made of given matrices, without a target directory behind them, and cases of the loss over them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from torchspec.core.models.target_head import SafetensorsTargetHead


@pytest.fixture
def make_head() -> Callable[..., SafetensorsTargetHead]:
    """make_head(vocabulary, hidden, scale=1.0, dtype=...): random rows, no final norm to apply."""

    def make(
        vocabulary: int, hidden: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
    ) -> SafetensorsTargetHead:
        generator = torch.Generator().manual_seed(vocabulary)
        rows_VH = (scale * torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)).to(dtype)
        return SafetensorsTargetHead(embedding_VH=rows_VH, head_VH=rows_VH, final_norm=nn.Identity())

    return make


def _by_path(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cases() -> ModuleType:
    """distillation_case.py."""
    return _by_path("distillation_case")


@pytest.fixture(scope="session")
def policies() -> ModuleType:
    """log_probability_case.py."""
    return _by_path("log_probability_case")


@pytest.fixture(params=["whole", "pruned"])
def case(request: pytest.FixtureRequest, cases: ModuleType, make_head: Callable[..., SafetensorsTargetHead]) -> Any:
    """17 rows and 3 steps in float64, over all 60 tokens or a third of them."""
    vocabulary = cases.vocabularies(60)[request.param]
    made = cases.Case.random(make_head(60, 8), vocabulary, rows=17, steps=3)
    agree_M = made.reference().terms.agree_M
    assert 3 < int(agree_M.sum()) < len(agree_M) - 3
    return made
