"""Text from an engine: greedy as transformers has it, sampled as its seed and its prompt say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from torchspec.backends.api import EngineOptions, TargetEngine
from torchspec.core import registry


@pytest.fixture(scope="module")
def writer(engine_name: str, targets: dict[str, Path], options: Callable[..., EngineOptions]) -> Iterator[TargetEngine]:
    engine = registry.load_engine(engine_name, options(targets["qwen3"]))
    yield engine
    engine.close()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (1, 7, 40, 130, 490)]


def test_greedy_text_is_transformers(
    writer: TargetEngine, targets: dict[str, Path], options: Callable[..., EngineOptions]
) -> None:
    """Up to the end of the turn, which is part of it, or the limit; together and alone."""
    hf = registry.load_engine("hf", options(targets["qwen3"]))
    expected = hf.generate(prompts(), max_new_tokens=20)
    assert writer.generate(prompts(), max_new_tokens=20) == expected
    assert [writer.generate([prompt], max_new_tokens=20)[0] for prompt in prompts()] == expected
    ended = [text for text in expected if 2 in text]
    assert all(text.index(2) == len(text) - 1 for text in ended)


def test_sampled_text_depends_on_seed_and_prompt_alone(writer: TargetEngine) -> None:
    together = writer.generate(prompts(), max_new_tokens=12, temperature=1.0, seed=3)
    assert [writer.generate([p], max_new_tokens=12, temperature=1.0, seed=3)[0] for p in prompts()] == together
    assert writer.generate(prompts(), max_new_tokens=12, temperature=1.0, seed=4) != together


def test_samples_follow_the_targets_distribution(
    writer: TargetEngine, targets: dict[str, Path], options: Callable[..., EngineOptions]
) -> None:
    """First tokens of 600 seeds: their total variation from softmax is what chance gives (mean + 5 deviations)."""
    count, prompt = 600, prompts()[1]
    hf = registry.load_engine("hf", options(targets["qwen3"]))
    expected_V = hf.open([prompt], ()).prefill.logits_BV[0].double().softmax(-1)
    drawn = [writer.generate([prompt], max_new_tokens=1, temperature=1.0, seed=seed)[0][0] for seed in range(count)]
    found_V = torch.bincount(torch.tensor(drawn), minlength=300).double() / count
    deviation_V = (expected_V * (1 - expected_V) / count).sqrt()
    chance = float(deviation_V.sum()) * (2 / torch.pi) ** 0.5 / 2  # half the mean absolute deviation of each share
    spread = float(deviation_V.square().sum().sqrt()) / 2
    assert float((found_V - expected_V).abs().sum()) / 2 < chance + 5 * spread
