"""Tiny targets with a real tokenizer and chat template, made once per test session."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def beside(name: str) -> ModuleType:
    """A module in the folder of this file."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


IMAGE_TARGETS = beside("image_targets")


def save_tokenizer(directory: Path) -> None:
    IMAGE_TARGETS.make_tokenizer(CHAT_TEMPLATE, {}).save_pretrained(directory)


GEOMETRY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao, here and in processes that a test starts, from the folder in which ci/test keeps it apart."""
    folder = Path(sys.prefix) / "lowbit"
    if (folder / "torchao").is_dir():
        monkeypatch.syspath_prepend(folder)
        others = os.environ.get("PYTHONPATH")
        monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{others}" if others else str(folder))
    elif importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")


@pytest.fixture(scope="session")
def quantised_targets() -> ModuleType:
    """quantised_targets.py."""
    return beside("quantised_targets")


@pytest.fixture(scope="session")
def published_drafts() -> ModuleType:
    """published_drafts.py."""
    return beside("published_drafts")


@pytest.fixture(scope="session")
def published_target(tmp_path_factory: pytest.TempPathFactory, published_drafts: ModuleType) -> Path:
    """What the drafts of published_drafts.py are for."""
    directory = tmp_path_factory.mktemp("targets") / "llama-3.1"
    published_drafts.save_target(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 8 layers with tied embeddings, float32."""
    directory = tmp_path_factory.mktemp("targets") / "qwen3"
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**GEOMETRY, tie_word_embeddings=True)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 8 layers with an untied head, float32."""
    directory = tmp_path_factory.mktemp("targets") / "llama"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**GEOMETRY, tie_word_embeddings=False)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3 of 8 layers: latent attention, YaRN, experts behind the first layer; float32."""
    directory = tmp_path_factory.mktemp("targets") / "deepseek"
    latent = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    experts = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    rope |= {"mscale": 0.8, "mscale_all_dim": 1.2}
    sizes = {name: size for name, size in GEOMETRY.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    torch.manual_seed(2)
    config = DeepseekV3Config(
        moe_intermediate_size=16, **sizes, **latent, **experts, rope_parameters=rope, tie_word_embeddings=False
    )
    DeepseekV3ForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def image_targets() -> ModuleType:
    """image_targets.py."""
    return IMAGE_TARGETS


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA: an image is 4 tokens."""
    directory: Path = IMAGE_TARGETS.save_llava(tmp_path_factory.mktemp("targets") / "llava", GEOMETRY)
    return directory


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma-3: an image is 4 tokens that see each other, between others."""
    directory: Path = IMAGE_TARGETS.save_gemma3(tmp_path_factory.mktemp("targets") / "gemma3", GEOMETRY)
    return directory


@pytest.fixture(scope="session")
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """peak_bytes(work): the most that is alive of what `work` allocates."""

    def measure(work: Callable[[], object]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        alive = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            most = max(most, alive)
        return most

    return measure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", help="engines whose environments must be here (vllm,sglang): absence is a failure")
