"""What training reports is what decoding does: on text the target generated greedily, round by round.

For every drafting round of real decoding that lies inside the text (i + 1 + K <= e, the last position of its span)
the number of accepted tokens equals the prefix hits A_i of the training forward at the round's slot i (for drafts of
blocks: of the block at anchor i + 1), the next round starts at i + 1 + A_i, and the simulated acceptance length is the
mean over those rounds. Greedy, float32, exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from torchspec.core.algorithms.blocks import batch as blocks
from torchspec.core.algorithms.blocks.body import BlockDraft, Drafted
from torchspec.core.algorithms.eagle3.batch import Plan, build_batch
from torchspec.core.decoding.generation import DecodeSettings, Generation
from torchspec.core.decoding.speculative import decode
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import START
from torchspec.core.models.target_spec import resolve_target
from torchspec.core.objectives.distillation import Head

K = 4
ROWS = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """Texts of the target after prompts, and a draft trained on some of them.

    `turns` [row][turn] are (prompt, text): a later turn's prompt holds the earlier turns, as in a conversation.
    """

    parts: Any
    turns: list[list[tuple[list[int], list[int]]]]

    @property
    def sequences(self) -> list[list[int]]:
        return [turns[-1][0] + turns[-1][1] for turns in self.turns]

    @property
    def masks(self) -> list[Tensor]:
        masks = [torch.zeros(len(ids), dtype=torch.bool) for ids in self.sequences]
        for mask, turns in zip(masks, self.turns, strict=True):
            for prompt, text in turns:
                mask[len(prompt) : len(prompt) + len(text)] = True
        return masks

    def decoded(self, batch_size: int) -> list[tuple[int, list[int], Generation]]:
        """Every turn decoded with the draft: its row, the text it should be, and what came."""
        places = [(row, *turn) for row, turns in enumerate(self.turns) for turn in turns]
        drafter, out = self.parts.drafter(), []
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            settings = DecodeSettings(max_new_tokens=max(len(text) for _, _, text in batch), draft_length=K)
            decoded = decode(self.parts.engine, drafter, [prompt for _, prompt, _ in batch], settings)
            out += [(row, text, g) for (row, _, text), g in zip(batch, decoded.generations, strict=True)]
        return out


def random_prompts(count: int, seed: int, vocabulary: int = 296) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        for length in torch.randint(2, 24, (count,), generator=generator).tolist()
    ]


def make_case(make_parts: Callable[..., Any], path: Path, prompts: list[list[int]], **options: Any) -> Case:
    """Greedy texts of the target, those of the most diverse ones, and a draft that has learned them in part.

    A tiny random target soon repeats itself; in such a text a draft that reads the wrong token goes unnoticed.
    """
    steps, limit, turns = options.pop("steps"), options.pop("max_new_tokens"), options.pop("turns", 1)
    parts = make_parts(path, **({} if "kind" in options else {"unroll": K}), **options)
    first = parts.engine.generate(prompts, max_new_tokens=limit)
    prompts = [prompts[row] for row in sorted(range(len(prompts)), key=lambda row: -len(set(first[row])))[:ROWS]]
    rows: list[list[tuple[list[int], list[int]]]] = [[] for _ in prompts]
    for turn in range(turns):
        texts = parts.engine.generate(prompts, max_new_tokens=limit)
        for row, prompt, text in zip(rows, prompts, texts, strict=True):
            row.append((prompt, text))
        asked = random_prompts(len(prompts), 50 + turn)
        prompts = [prompt + text + more for prompt, text, more in zip(prompts, texts, asked, strict=True)]
    case = Case(parts=parts, turns=rows)
    parts.train(case.sequences, case.masks, steps)
    return case


CASES: dict[str, dict[str, Any]] = {
    "qwen3, two turns": {"steps": 140, "max_new_tokens": 25, "turns": 2},
    "llama, small vocabulary": {"ids_N": torch.arange(0, 300, 2), "steps": 60, "max_new_tokens": 40},
    "embedded": {"steps": 20, "max_new_tokens": 40},
    "deepseek, latent attention": {"attention": "mla", "steps": 60, "max_new_tokens": 40},
    "dflash, qwen3, two turns": {
        "kind": "dflash", "num_layers": 2, "block_size": K + 1, "layer_types": ("full", "sliding"), "sliding_window": 9,
        "steps": 40, "max_new_tokens": 25, "turns": 2,
    },
    "dflash, llama, small vocabulary": {
        "kind": "dflash", "num_layers": 2, "block_size": K, "sample_from_anchor": True,
        "ids_N": torch.arange(0, 300, 2), "steps": 30, "max_new_tokens": 40,
    },
    "dflash, embedded": {"kind": "dflash", "num_layers": 2, "block_size": K + 1, "steps": 40, "max_new_tokens": 40},
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest,
    make_parts: Callable[..., Any],
    tiny_target: Path,
    tiny_llama: Path,
    tiny_deepseek: Path,
) -> Case:
    options = dict(CASES[request.param])
    if "deepseek" in request.param:
        return make_case(make_parts, tiny_deepseek, random_prompts(40, 1), **options)
    if "qwen3" in request.param:
        return make_case(make_parts, tiny_target, random_prompts(40, 1), **options)
    if "llama" in request.param:
        return make_case(make_parts, tiny_llama, random_prompts(40, 2), **options)
    path = resolve_target("embedded")
    tokenizer = AutoTokenizer.from_pretrained(path)
    questions = [
        "Write the function add(a, b) that returns the sum of two numbers.",
        "What does this function do?\n\ndef f(x):\n    return sorted(x)[:3]",
        "Write a method close(self): Close the file.",
        "Write the function is_valid(name): Return True if the name is valid.",
        "Write the function read_lines(path): Return the lines of a file.",
        "Write a class Stack with the methods push and pop.",
    ]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    return make_case(make_parts, path, prompts, **options)


Choices = dict[tuple[int, int, int], int]  # of (row, slot, step), those supervised


def training_hits(parts: Any, sequences: Sequence[Sequence[int]], masks: Sequence[Tensor]) -> list[list[int]]:
    """A_i of every slot, counted here from the draft's outputs in the training forward: a step is a hit if the
    predicted token is supervised and the draft's first choice is the text's own token, which is the target's argmax."""
    rows = FeatureRows.of(parts.features(sequences), masks)
    said = (block_choices if isinstance(parts.draft, BlockDraft) else unrolled_choices)(parts, rows)
    return [
        [
            next((k for k in range(K) if said.get((row, i, k)) != (ids[i + 2 + k] if i + 2 + k < len(ids) else -1)), K)
            for i in range(len(ids))
        ]
        for row, ids in enumerate(sequences)
    ]


def unrolled_choices(parts: Any, rows: FeatureRows) -> Choices:
    batch = build_batch(rows, Plan(steps=K, chunk_rows=64, device=torch.device("cpu")))
    steps = torch.split(batch.pairs.slot_M, list(batch.pairs.sizes))

    def first_choices(outputs: list[Tensor], head: Head) -> Tensor:
        chosen = torch.cat([output[slots] for output, slots in zip(outputs, steps, strict=True)])
        hidden_MH = torch.nn.functional.rms_norm(chosen, head.norm_H.shape, head.norm_H, head.eps)
        return parts.draft.vocabulary.ids_N[(hidden_MH @ head.head_NH.T).argmax(-1)]

    with torch.no_grad():
        choice_M = parts.draft(batch.inputs, parts.head.embedding_VH, K, parts.device, first_choices)
    length, said = rows.tokens.length, {}
    for cell, token in zip(batch.pairs.cell_M.tolist(), choice_M.tolist(), strict=True):
        said[cell // K // length, cell // K % length, cell % K] = token
    return said


def block_choices(parts: Any, rows: FeatureRows) -> Choices:
    batch = blocks.build_batch(rows, parts.algorithm.plan(parts.head, 1 << 20), START)

    def first_choices(drafted: Drafted) -> Tensor:
        head = drafted.head
        outputs_KXH = torch.stack(drafted.outputs)
        logits_KXN = (
            torch.nn.functional.rms_norm(outputs_KXH, head.norm_H.shape, head.norm_H, head.eps) @ head.head_NH.T
        )
        if drafted.extras is not None:
            logits_KXN = logits_KXN + torch.stack(drafted.extras) @ head.extra_NX.T  # type: ignore[union-attr]
        return parts.draft.vocabulary.ids_N[logits_KXN.argmax(-1)].T

    with torch.no_grad():
        choice_XK = parts.draft(batch.inputs, parts.head, parts.device, first_choices)
    count, said = batch.blocks.count, {}
    for cell in batch.pairs.cell_M.tolist():
        row, block, step = cell // K // count, cell // K % count, cell % K
        said[row, int(batch.blocks.anchor_BA[row, block]) - 1, step] = int(choice_XK[cell // K, step])
    return said


def whole_rounds(generation: Generation, length: int) -> list[Any]:
    """The rounds that lie inside the first `length` tokens of the text."""
    last = generation.prompt_tokens + length - 1
    return [entry for entry in generation.rounds if entry.slot + 1 + K <= last]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_round_accepts_what_the_training_forward_says(case: Case, batch_size: int) -> None:
    hits = training_hits(case.parts, case.sequences, case.masks)
    seen = []
    for row, text, generation in case.decoded(batch_size):
        assert list(generation.tokens[: len(text)]) == text
        rounds = whole_rounds(generation, len(text))
        for at, entry in enumerate(rounds):
            assert entry.accepted == hits[row][entry.slot], (row, entry)
            if at + 1 < len(generation.rounds):
                assert generation.rounds[at + 1].slot == entry.slot + 1 + hits[row][entry.slot]
        seen += [entry.accepted for entry in rounds]
    assert len(seen) >= 20
    assert len(set(seen)) >= 3, f"the draft is too good or too bad to tell rounds apart: {seen}"

    figures = case.parts.step(case.sequences, case.masks).sums
    assert int(figures["walk_rounds"]) == len(seen)
    assert figures["walk_hits"].tolist() == [sum(accepted > k for accepted in seen) for k in range(K)]
    simulated = case.parts.algorithm.summarise(figures)["simulated_acceptance_length"]
    assert simulated == pytest.approx(1 + sum(seen) / len(seen), abs=1e-12)
