"""A small real run: tiny Qwen3, conversations on disk."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, dynamic_module_utils

from torchspec.core.config.load import load_config
from torchspec.core.config.schema import RunConfig

HERE = Path(__file__).resolve().parent
WORDS = ["the", "quick", "brown", "fox", "returns", "value", "of", "function", "and", "list", "all", "values"]


@pytest.fixture(scope="session")
def table() -> ModuleType:
    """ci/recipes_table.py."""
    return _by_path("recipes_table", HERE.parents[2] / "ci")


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """runs.py."""
    return _by_path("runs")


@pytest.fixture(scope="session")
def online() -> ModuleType:
    """online_case.py."""
    return _by_path("online_case")


@pytest.fixture(scope="module")
def kept_policy(online: ModuleType, tiny_target: Path) -> PreTrainedModel:
    """With a tied embedding. Not to be changed."""
    policy: PreTrainedModel = online.load_policy(tiny_target)
    return policy


@pytest.fixture
def policy(online: ModuleType, tiny_llama: Path) -> PreTrainedModel:
    """With a head of its own."""
    policy: PreTrainedModel = online.load_policy(tiny_llama)
    return policy


def _by_path(name: str, directory: Path = HERE) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, directory / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 short conversations, and 3 for validation."""
    directory = tmp_path_factory.mktemp("conversations")
    rows = []
    for number in range(16):
        question = " ".join(WORDS[number % 5 : number % 5 + 4])
        answer = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(6 + number % 5))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"id": f"c{number}", "messages": messages}))
    (directory / "train.jsonl").write_text("\n".join(rows[:13]) + "\n")
    (directory / "validation.jsonl").write_text("\n".join(rows[13:]) + "\n")
    return directory


@pytest.fixture
def sliding_target(tiny_target: Path, tmp_path: Path) -> Path:
    """A random Mistral whose layers see 32 tokens back."""
    sizes = json.loads((tiny_target / "config.json").read_text())
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "eos_token_id",
    )  # fmt: skip
    config = MistralConfig(**{name: sizes[name] for name in names}, bos_token_id=None, sliding_window=32)
    MistralForCausalLM(config).save_pretrained(tmp_path / "sliding")
    for file in (*tiny_target.glob("*token*"), *tiny_target.glob("chat_template*")):
        shutil.copy(file, tmp_path / "sliding")
    return tmp_path / "sliding"


@pytest.fixture
def own_code_target(tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny target as an architecture that only the code in its own directory knows."""
    directory = tmp_path / "own_code"
    shutil.copytree(tiny_target, directory)
    (directory / "tiny_own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n\n"
        "class TinyOwnConfig(Qwen3Config):\n    model_type = 'tiny_own'\n\n"
        "class TinyOwnForCausalLM(Qwen3ForCausalLM):\n    config_class = TinyOwnConfig\n"
    )
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "tiny_own", "architectures": ["TinyOwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "tiny_own.TinyOwnConfig",
        "AutoModelForCausalLM": "tiny_own.TinyOwnForCausalLM",
    }
    (directory / "config.json").write_text(json.dumps(config))
    # Where transformers copies such code to; not into the home of whoever runs the tests.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return directory


MakeConfig = Callable[..., tuple[RunConfig, dict[str, str]]]


@pytest.fixture
def make_config(tiny_target: Path, conversations: Path, tmp_path: Path) -> MakeConfig:
    """make_config(output, "section.key=value", ...): configuration and provenance as the command line makes them."""

    def make(output: Path, *overrides: str, **values: Any) -> tuple[RunConfig, dict[str, str]]:
        base: dict[str, Any] = {
            "output": str(output),
            "device": "cpu",
            "target": {"path": str(tiny_target)},
            "data": {
                "train": [str(conversations / "train.jsonl")],
                "validation": [str(conversations / "validation.jsonl")],
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {"batch_size": 4, "micro_batch_size": 2, "warmup_steps": 1, "checkpoint_every": 3},
            "eval": {"samples": 2, "max_new_tokens": 6, "draft_length": 2},
            "draft": {"unroll": 3, "vocab_size": 100},
        }
        return load_config(values={**base, **values}, overrides=overrides)

    return make
