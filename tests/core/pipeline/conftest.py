"""A small real run: tiny Qwen3, conversations on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchspec.core.config.load import load_config
from torchspec.core.config.schema import RunConfig

WORDS = ["the", "quick", "brown", "fox", "returns", "value", "of", "function", "and", "list", "all", "values"]


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
