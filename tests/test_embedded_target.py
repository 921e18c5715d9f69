"""The target that ships: a real, small language model of a standard architecture, and what its card says of it."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchspec.cli.commands.quickstart import ANSWERS, GENERATED_TOKENS
from torchspec.core import registry
from torchspec.core.algorithms.eagle3 import SPEC
from torchspec.core.data.dataset import Prompt
from torchspec.core.data.stdlib_corpus import Conversation, iter_conversations
from torchspec.core.decoding.evaluate import EvalSettings, evaluate
from torchspec.core.decoding.remembered import digest_of, read_answers
from torchspec.core.interfaces.engine import EngineOptions
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(str(resources.files("torchspec") / "assets" / "embedded_target"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out() -> list[Conversation]:
    """Evenly over the held-out modules of the interpreter at hand."""
    everything = list(iter_conversations("test"))
    return everything[:: len(everything) // 24][:24]


def test_it_is_small_deep_and_narrow(folder: Path, model: Any) -> None:
    config = model.config
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12 * MEGABYTE
    assert config.model_type in ("qwen3", "llama")
    assert config.num_hidden_layers >= 8
    assert config.head_dim in (32, 64)
    assert config.num_key_value_heads >= 2
    assert not list(folder.glob("*.py")), "it loads without code of its own"


def test_the_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    """The mask covers the answer and the end of its turn, but not the newline behind."""
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "def f(x):\n    return x"}]
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [t for t, on in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(said) == "def f(x):\n    return x<|im_end|>"
    assert said[-1] == tokenizer.eos_token_id


@torch.no_grad()
def test_it_has_learned_python(model: Any, tokenizer: Any, held_out: list[Conversation]) -> None:
    """Cross-entropy of held-out answers, in nats per token: an untrained model has log(2048) = 7.6."""
    total, counted = 0.0, 0
    for conversation in held_out:
        rendered = tokenizer.apply_chat_template(
            conversation.messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(rendered["input_ids"])
        counts = torch.tensor(rendered["assistant_masks"], dtype=torch.bool)[1:]
        log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        total -= float(log_p.gather(1, ids[1:, None])[:, 0][counts].sum())
        counted += int(counts.sum())
    assert total / counted < 3.0


@torch.no_grad()
def test_its_answers_do_not_loop(model: Any, tokenizer: Any, held_out: list[Conversation]) -> None:
    """Share of repeated 8-grams of greedy answers. The card's figure is of more of them; a looping model has 0.5."""
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        [c.messages[:-1] for c in held_out], add_generation_prompt=True, padding=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=192, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    total = repeated = 0
    for row in output.tolist():
        answer = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
        grams = [tuple(answer[i : i + 8]) for i in range(len(answer) - 7)]
        total, repeated = total + len(grams), repeated + len(grams) - len(set(grams))
    assert total > 1000
    assert repeated / total < 0.25


def test_its_card_states_its_quality(folder: Path) -> None:
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert re.search(r"perplexity.*\| \d+\.\d+", card)
    assert re.search(r"repeated 8-grams.*\| (0|1?\d)\.\d %", card), "under 20 %"


def test_an_untrained_draft_is_accepted_almost_never(
    folder: Path, tokenizer: Any, held_out: list[Conversation]
) -> None:
    """Whatever acceptance a run reports above 1.0 comes from training."""
    cpu, target = registry.load_device("cpu"), read_target_spec(folder)
    algorithm = SPEC.create(SPEC.options(), target)
    head = load_target_head(folder, dtype=torch.float32, device=torch.device("cpu"))
    vocabulary = VocabularyMap(ids_N=torch.arange(target.vocab_size), target_size=target.vocab_size)
    torch.manual_seed(0)
    drafter = algorithm.drafter(algorithm.build_draft(vocabulary, head).requires_grad_(False), head, cpu)
    asked = [
        tokenizer.apply_chat_template(c.messages[:-1], add_generation_prompt=True, return_dict=False)
        for c in held_out[::4]
    ]
    prompts = [Prompt(sample_id=str(n), input_ids=tuple(ids)) for n, ids in enumerate(asked)]
    engine = registry.load_engine("hf", EngineOptions(target=folder, device=cpu, dtype="float32"))
    result = evaluate(
        engine, drafter, prompts, EvalSettings(max_new_tokens=48, draft_length=5, compare_draftless=False)
    )
    assert result.rounds > 100
    assert 1.0 <= result.acceptance_length < 1.15


def test_the_answers_beside_it_are_its_own(folder: Path, tokenizer: Any) -> None:
    """Written again by the model at hand; where two tokens are tied another processor may choose the other."""
    known = read_answers(folder / ANSWERS, folder, GENERATED_TOKENS)
    assert len(known) > 10_000
    asked = [
        tuple(tokenizer.apply_chat_template(c.messages[:-1], add_generation_prompt=True, return_dict=False))
        for c in list(iter_conversations("train"))[::150]
    ]
    remembered = [(ids, known[digest_of(ids)]) for ids in asked if digest_of(ids) in known]
    assert len(remembered) > len(asked) / 4, "most questions are the same on every Python"
    chosen = sorted(remembered, key=lambda pair: len(pair[1]))[:24]
    options = EngineOptions(target=folder, device=registry.load_device("cpu"), dtype="float32")
    engine = registry.load_engine("hf", options)
    written = engine.generate([ids for ids, _ in chosen], max_new_tokens=64)
    same = sum(text == answer[:64] for text, (_, answer) in zip(written, chosen, strict=True))
    assert same >= len(chosen) - 2
