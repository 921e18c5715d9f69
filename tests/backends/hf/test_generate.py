"""Generation against transformers' own greedy search, and the sampler against its definition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from torchspec.backends.hf.engine import HfEngine
from torchspec.backends.hf.generate import prompt_generator, sample


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def greedy_by_transformers(path: Path, asked: list[list[int]], new: int) -> list[list[int]]:
    """One prompt at a time, by transformers' own `generate`."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    outputs = [
        model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0) for ids in asked
    ]
    return [output[0, len(ids) :].tolist() for ids, output in zip(asked, outputs, strict=True)]


@pytest.mark.parametrize("name", ["tiny_target", "tiny_llama"])
def test_greedy_equals_transformers_token_for_token(
    name: str, request: pytest.FixtureRequest, load_hf: Callable[..., HfEngine]
) -> None:
    path = request.getfixturevalue(name)
    asked = prompts(0, 9, 2, 1, 14, 5)
    expected = greedy_by_transformers(path, asked, 16)
    engine = load_hf(path)
    assert engine.generate(asked, max_new_tokens=16) == expected
    assert [engine.generate([prompt], max_new_tokens=16)[0] for prompt in asked] == expected
    assert len(set(map(tuple, expected))) == len(asked)


def test_stops_at_the_end_of_turn_and_keeps_it(tiny_target: Path, load_hf: Callable[..., HfEngine]) -> None:
    """The token that greedy search gives at some place is declared to end a turn; rows then end at different times."""
    asked = prompts(1, 6, 3, 8)
    engine = load_hf(tiny_target)
    free = engine.generate(asked, max_new_tokens=12)
    stop = free[1][4]
    object.__setattr__(engine._target.spec, "eos_token_ids", (299, stop))
    expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in free]
    assert engine.generate(asked, max_new_tokens=12) == expected
    assert len(expected[1]) <= 5


def test_windows_generate_too(save_target: Callable[[Gemma2Config], Path], load_hf: Callable[..., HfEngine]) -> None:
    path = save_target(
        Gemma2Config(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=8, eos_token_id=2,
        )
    )  # fmt: skip
    asked = prompts(2, 7, 3)
    assert load_hf(path).generate(asked, max_new_tokens=12) == greedy_by_transformers(path, asked, 12)


def test_sampling_depends_on_seed_and_prompt_not_on_the_batch(qwen3: HfEngine) -> None:
    asked = prompts(3, 4, 9, 6)
    together = qwen3.generate(asked, max_new_tokens=10, temperature=1.0, seed=7)
    alone = [qwen3.generate([prompt], max_new_tokens=10, temperature=1.0, seed=7)[0] for prompt in reversed(asked)]
    assert together == alone[::-1]
    assert together != qwen3.generate(asked, max_new_tokens=10, temperature=1.0, seed=8)


def test_prompts_and_seeds_draw_independently() -> None:
    keys = [(seed, prompt) for seed in (0, 1) for prompt in ([1], [2], [1, 2], [12])]
    assert len({torch.rand(1, generator=prompt_generator(*key)).item() for key in keys}) == len(keys)


def test_first_sampled_token_has_the_target_distribution(qwen3: HfEngine) -> None:
    """4,000 seeds of one prompt; every token within 5 standard errors of softmax(logits / temperature)."""
    (prompt,), temperature, draws = prompts(4, 5), 2.0, 4000
    logits_V = qwen3.open([prompt], ()).prefill.logits_BV[0].double()
    expected_V = torch.softmax(logits_V / temperature, -1)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    counts = Counter(sample(logits_V.expand(draws, -1), temperature, uniform).tolist())
    for token, probability in enumerate(expected_V.tolist()):
        error = (probability * (1 - probability) / draws) ** 0.5
        assert abs(counts[token] / draws - probability) <= 5 * error + 1 / draws


def test_sampling_never_takes_an_impossible_token() -> None:
    logits_BV = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(5, -1)
    uniform_B = torch.tensor([0.0, 0.4999, 0.5, 0.75, 1.0])
    assert sample(logits_BV, 1.0, uniform_B).tolist() == [1, 1, 3, 3, 1]


def test_wrong_numbers_are_named(qwen3: HfEngine) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        qwen3.generate([[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature must not be negative"):
        qwen3.generate([[1]], max_new_tokens=1, temperature=-0.5)
    assert qwen3.generate([], max_new_tokens=3) == []
