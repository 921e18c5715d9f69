"""Engines on the CPU over tiny targets of several architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from torchspec.backends.api import EngineOptions
from torchspec.backends.hf.engine import HfEngine
from torchspec.core.registry import load_device


@pytest.fixture(scope="session")
def load_hf() -> Callable[..., HfEngine]:
    """Load the hf engine on a target directory."""

    def load(target: Path, **options: object) -> HfEngine:
        return HfEngine.load(EngineOptions(target=target, device=load_device("cpu"), **options))  # type: ignore[arg-type]

    return load


@pytest.fixture(scope="session")
def qwen3(tiny_target: Path, load_hf: Callable[..., HfEngine]) -> HfEngine:
    return load_hf(tiny_target)


@pytest.fixture(scope="session")
def llama(tiny_llama: Path, load_hf: Callable[..., HfEngine]) -> HfEngine:
    return load_hf(tiny_llama)


@pytest.fixture
def save_target(tmp_path: Path) -> Callable[[PreTrainedConfig], Path]:
    """A directory with a random model of this configuration, float32, its norms and biases off their defaults."""

    def save(config: PreTrainedConfig) -> Path:
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        directory = tmp_path / config.model_type
        model.save_pretrained(directory)
        return directory

    return save
