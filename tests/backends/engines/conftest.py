"""Real engines in their own environments. `--engines vllm,sglang` makes their absence a failure instead of a skip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from torchspec.backends.api import EngineOptions, EngineProcess
from torchspec.backends.remote.environments import find
from torchspec.core import registry
from torchspec.core.data.stdlib_corpus import iter_conversations
from torchspec.core.models.target_spec import resolve_target

ENGINES = ("vllm", "sglang")
TAPS = (1, 3, 5)
# Engines have kernels for heads of 32 and more.
SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(scope="session", params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> str:
    """Each engine whose environment `torchspec engine install` made."""
    name: str = request.param
    needed = (request.config.getoption("--engines") or "").split(",")
    if find(name, "cpu") is None:
        message = f"no environment of {name}: torchspec engine install {name} --device cpu"
        if name in needed:
            pytest.fail(message)
        pytest.skip(message)
    return name


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Its norms off their defaults, so that one left out would show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense ones with a tied and an untied head, grouped heads, and a mixture of experts."""
    place = tmp_path_factory.mktemp("engine-targets")
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return {
        "llama": save(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)), place / "llama"),
        "qwen3": save(Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)), place / "qwen3"),
        "moe": save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts, tie_word_embeddings=False)), place / "moe"),
    }


@pytest.fixture(scope="session")
def options() -> Callable[..., EngineOptions]:
    def make(target: Path, *, taps: tuple[int, ...] = (), **process: Any) -> EngineOptions:
        return EngineOptions(
            target=target,
            device=registry.load_device("cpu"),
            dtype="float32",
            taps=taps,
            process=EngineProcess(store_mb=200, **process),
        )

    return make


@pytest.fixture(scope="session")
def embedded() -> Path:
    return resolve_target(Path("embedded"))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few of each split of the embedded target's own, as files."""
    place = tmp_path_factory.mktemp("conversations")
    files = {}
    for split, count in (("train", 480), ("validation", 40)):
        everything = list(iter_conversations(split))
        step = max(1, len(everything) // count)
        files[split] = place / f"{split}.jsonl"
        rows = [json.dumps({"id": c.id, "messages": c.messages}) for c in everything[::step][:count]]
        files[split].write_text("\n".join(rows) + "\n")
    return files
