"""Decoding, evaluation and regeneration with the hf engine, an EAGLE-3 draft and the data room's own readers."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from torchspec.core.data.dataset import load_dataset
from torchspec.core.data.prompts import load_prompts
from torchspec.core.data.report import DatasetSettings
from torchspec.core.data.tokenizer import load_tokenizer
from torchspec.core.decoding.evaluate import EvalSettings, Variant, compare, evaluate
from torchspec.core.decoding.generation import DecodeSettings
from torchspec.core.decoding.plain import decode_plain
from torchspec.core.decoding.prompt_lookup import PromptLookupDrafter
from torchspec.core.decoding.regenerate import RegenerateSettings, regenerate
from torchspec.core.decoding.speculative import decode
from torchspec.core.interfaces.engine import EngineOptions
from torchspec.core.registry import load_device, load_engine

Make = Callable[..., Any]


def random_prompts(lengths: list[int], vocabulary: int = 296) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def parts(make_parts: Make, tiny_target: Path) -> Any:
    parts = make_parts(tiny_target, unroll=3)
    prompts = random_prompts([5, 9, 14])
    sequences = [p + t for p, t in zip(prompts, parts.engine.generate(prompts, max_new_tokens=30), strict=True)]
    parts.train(sequences, [torch.ones(len(ids), dtype=torch.bool) for ids in sequences], 15)
    return parts


@pytest.mark.parametrize("batch", [1, 5])
def test_texts_are_those_of_transformers(parts: Any, tiny_target: Path, batch: int) -> None:
    """The oracle: the whole sequence through the stock model again for every token, no cache, no batch."""
    prompts = random_prompts([14, 3, 22, 5, 9])
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            while ids.shape[1] < len(prompt) + 25 and (ids.shape[1] == len(prompt) or ids[0, -1] != 2):
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        wanted.append(ids[0, len(prompt) :].tolist())
    request = DecodeSettings(max_new_tokens=25, draft_length=4)
    for drafter in (None, parts.drafter(), PromptLookupDrafter()):
        texts = []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            way = decode_plain(parts.engine, some, request) if drafter is None else None
            texts += (way or decode(parts.engine, drafter, some, request)).generations
        assert [list(generation.tokens) for generation in texts] == wanted


def test_the_context_ends_a_text(parts: Any) -> None:
    """512 positions: a prompt of 500 tokens leaves 12, beside one that its limit ends."""
    prompts = random_prompts([500, 5])
    request = DecodeSettings(max_new_tokens=15, draft_length=6)
    for some in (prompts, prompts[:1]):
        plain = decode_plain(parts.engine, some, request).generations
        drafted = decode(parts.engine, parts.drafter(), some, request).generations
        assert [(g.tokens, g.finish) for g in plain] == [(g.tokens, g.finish) for g in drafted]
        assert (len(plain[0].tokens), plain[0].finish) == (12, "context")
        reached = max(r.slot + 1 + r.proposed for r in drafted[0].rounds)
        assert reached <= 511


def test_a_nearly_full_row_beside_one_that_accepts_more(parts: Any) -> None:
    """The row of 509 of 512 tokens accepts nothing; the other's news are wider than what is left for drafting."""
    nearly_full = torch.randint(3, 296, (509,), generator=torch.Generator().manual_seed(9)).tolist()
    prompts = [nearly_full, random_prompts([5, 9, 14])[1]]
    request = DecodeSettings(max_new_tokens=15, draft_length=6)
    drafted = decode(parts.engine, parts.drafter(), prompts, request).generations
    assert [generation.rounds[0].accepted for generation in drafted] == [0, 2]
    plain = decode_plain(parts.engine, prompts, request).generations
    assert [(g.tokens, g.finish) for g in plain] == [(g.tokens, g.finish) for g in drafted]


@pytest.mark.parametrize("drafting", ["eagle3", "prompt lookup"])
def test_sampled_text_has_the_targets_distribution(
    make_parts: Make, tmp_path_factory: pytest.TempPathFactory, drafting: str
) -> None:
    """8 tokens, 3 new ones: all 512 texts against the stock model's own probabilities (chi-square)."""
    path = tmp_path_factory.mktemp("vocabulary-of-8")
    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 7, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(4)
    config = Qwen3Config(**sizes, **heads, eos_token_id=7, bos_token_id=None, initializer_range=0.3)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(path)
    parts = make_parts(path, ids_N=torch.tensor([0, 1, 2, 4, 5, 7]))
    prompt, temperature, rows = [1, 5, 1, 3], 1.3, 4000

    texts = torch.tensor(list(itertools.product(range(8), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat((torch.tensor([prompt]).expand(512, -1), texts), dim=1)).logits[:, 3:6]
    chances = (logits.double() / temperature).softmax(-1).gather(2, texts[..., None])[..., 0]
    exact: dict[tuple[int, ...], float] = {}
    for text, chance in zip(texts.tolist(), chances.tolist(), strict=True):
        end = text.index(7) + 1 if 7 in text else 3
        exact[tuple(text[:end])] = float(torch.tensor(chance[:end], dtype=torch.float64).prod())

    drafter = parts.drafter() if drafting == "eagle3" else PromptLookupDrafter()
    request = DecodeSettings(max_new_tokens=3, draft_length=2, temperature=temperature)
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(rows // 1000):
        decoded = decode(parts.engine, drafter, [prompt] * 1000, request, seed=seed)
        found.update(generation.tokens for generation in decoded.generations)
    cells = [(found[text], chance * rows) for text, chance in exact.items()]
    rare = (sum(n for n, e in cells if e < 5), sum(e for _, e in cells if e < 5))
    cells = [*((n, e) for n, e in cells if e >= 5), rare]
    statistic = torch.tensor(sum((n - e) ** 2 / e for n, e in cells), dtype=torch.float64)
    freedom = torch.tensor(len(cells) - 1, dtype=torch.float64)
    assert len(cells) > 30
    assert float(torch.special.gammaincc(freedom / 2, statistic / 2)) > 1e-3


CONVERSATIONS = [
    {"id": f"c{at}", "messages": [{"role": "user", "content": f"the value {at} of the fox " * (1 + at % 3)}]}
    for at in range(6)
]


def test_evaluation_from_a_file_of_conversations(parts: Any, tiny_target: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    prompts = load_prompts([data], load_tokenizer(tiny_target), DatasetSettings())
    ways = {
        "eagle3": Variant(drafter=parts.drafter(), draft_length=3),
        "lookup": Variant(drafter=PromptLookupDrafter(), draft_length=3),
    }
    results = compare(parts.engine, ways, prompts, EvalSettings(max_new_tokens=20, batch_size=2))
    for result in results.values():
        assert result.lossless is True
        assert (result.prompts, result.dtype) == (6, "float32")
        assert result.acceptance_length == pytest.approx(1 + sum(result.acceptance_per_position), abs=1e-12)
        json.dumps(result.to_json(records=True), allow_nan=False)


def test_bfloat16_is_reported_as_such(parts: Any, tiny_target: Path) -> None:
    options = EngineOptions(target=tiny_target, device=load_device("cpu"), dtype="bfloat16")

    class Prompt:
        def __init__(self, ids: list[int]) -> None:
            self.sample_id, self.input_ids, self.images = str(len(ids)), ids, ()

    prompts = [Prompt(ids) for ids in random_prompts([4, 5, 6, 7])]
    result = evaluate(load_engine("hf", options), parts.drafter(), prompts, EvalSettings(max_new_tokens=20))
    assert result.dtype == "bfloat16"
    assert result.lossless is (not result.mismatches)
    assert (result.tie_mismatches or 0) + (result.other_mismatches or 0) == len(result.mismatches)
    assert result.seconds.draft > 0


def test_regenerated_text_does_not_depend_on_the_batch(parts: Any, tiny_target: Path, tmp_path: Path) -> None:
    data, tokenizer = tmp_path / "data.jsonl", load_tokenizer(tiny_target)
    data.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    written = []
    for size in (1, 4):
        request = RegenerateSettings(max_new_tokens=12, temperature=1.0, batch_size=size)
        regenerate(parts.engine, tokenizer, [data], tmp_path / f"{size}.jsonl", request)
        rows = map(json.loads, (tmp_path / f"{size}.jsonl").read_text().splitlines())
        written.append({row["id"]: row["input_ids"] for row in rows})
    assert written[0] == written[1]


def test_regenerated_conversations_are_training_data(parts: Any, tiny_target: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    tokenizer = load_tokenizer(tiny_target)
    report = regenerate(parts.engine, tokenizer, [data], output, RegenerateSettings(max_new_tokens=12, batch_size=4))
    assert (report.ok, report.failed) == (6, 0)
    rows = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
    settings = DatasetSettings(min_supervised_tokens=1, cache_dir=tmp_path / "cache")
    dataset = load_dataset([output], tokenizer, settings)
    assert len(dataset) == sum(any(row["loss_mask"]) for row in rows.values()) > 0
    for sample in (dataset[at] for at in range(len(dataset))):
        row = rows[sample.sample_id]
        assert sample.input_ids_T.tolist() == row["input_ids"]
        assert sample.loss_mask_T.tolist() == [bool(bit) for bit in row["loss_mask"]]
        start = row["loss_mask"].index(1)
        text = row["input_ids"][start:]
        again = parts.engine.generate([row["input_ids"][:start]], max_new_tokens=12)[0]
        assert again[: len(text)] == text
