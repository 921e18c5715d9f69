"""What training reports is what decoding does: on text that the embedded target generated greedily, round by round.

With every element kept, for every drafting round of real decoding that lies inside a text (i + 1 + K <= e, the last
position of its span) the number of accepted tokens equals the prefix hits A_i of the training forward at the round's
slot i, and the simulated acceptance length is the mean over those rounds. Greedy, float32, exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from torchspec.core.algorithms.peagle.algorithm import PEagle
from torchspec.core.algorithms.peagle.batch import Plan, build_batch
from torchspec.core.algorithms.peagle.options import PEagleOptions
from torchspec.core.decoding.generation import DecodeSettings
from torchspec.core.decoding.speculative import decode
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import START
from torchspec.core.interfaces.engine import CaptureRequest, EngineOptions
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec, resolve_target
from torchspec.core.objectives.distillation import Head
from torchspec.core.registry import load_device, load_engine

K = 4
QUESTIONS = (
    "Write the function add(a, b) that returns the sum of two numbers.",
    "What does this function do?\n\ndef f(x):\n    return sorted(x)[:3]",
    "Write a method close(self): Close the file.",
    "Write a class Stack with the methods push and pop.",
)


def training_hits(algorithm: PEagle, draft: torch.nn.Module, parts: tuple, rows: FeatureRows) -> list[list[int]]:
    """A_i of every slot, counted here from the draft's outputs: a depth is a hit if the predicted token is supervised
    and the draft's first choice is the text's own token, which is the target's."""
    head, device = parts
    plan = Plan(sampling=algorithm.sampling, chunk_rows=64, device=torch.device("cpu"))
    batch = build_batch(rows, plan, START)
    depths = torch.split(batch.pairs.slot_M, list(batch.pairs.sizes))

    def first_choices(outputs: list[Tensor], own: Head) -> Tensor:
        chosen = torch.cat([output[slots] for output, slots in zip(outputs, depths, strict=True)])
        hidden_MH = torch.nn.functional.rms_norm(chosen, own.norm_H.shape, own.norm_H, own.eps)
        return (hidden_MH @ own.head_NH.T).argmax(-1)

    with torch.no_grad():
        choice_M = draft(batch.inputs, head.embedding_VH, device, first_choices)
    ids_BT = rows.tokens.input_ids_BT
    hits_BTK = torch.zeros((*ids_BT.shape, K), dtype=torch.bool)
    for cell, token in zip(batch.pairs.cell_M.tolist(), choice_M.tolist(), strict=True):
        row, slot, depth = cell // K // ids_BT.shape[1], cell // K % ids_BT.shape[1], cell % K
        hits_BTK[row, slot, depth] = token == int(ids_BT[row, slot + 2 + depth])
    counted: list[list[int]] = hits_BTK.long().cumprod(-1).sum(-1).tolist()
    return counted


@pytest.mark.parametrize("layers", [1, 2])
def test_every_round_accepts_what_the_training_forward_says(layers: int) -> None:
    path, device = resolve_target("embedded"), load_device("cpu")
    spec, tokenizer = read_target_spec(path), AutoTokenizer.from_pretrained(path)
    head = load_target_head(path, dtype=torch.float32, device=torch.device("cpu"))
    engine = load_engine("hf", EngineOptions(target=path, device=device, dtype="float32"))
    algorithm = PEagle.create(
        PEagleOptions(vocab_size=spec.vocab_size, num_layers=layers, depths=K, depth_ratio=1.0), spec
    )
    torch.manual_seed(0)
    draft = algorithm.build_draft(VocabularyMap.identity(spec.vocab_size), head)
    prompts: list[list[int]] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    texts = engine.generate(prompts, max_new_tokens=40)
    sequences = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    masks = [torch.arange(len(ids)) >= len(prompt) for ids, prompt in zip(sequences, prompts, strict=True)]
    sink = MemoryStore()
    requests = [CaptureRequest(record_id=str(n), input_ids=ids) for n, ids in enumerate(sequences)]
    rows = FeatureRows.of([take(sink, ref) for ref in engine.capture(requests, algorithm.taps, sink)], masks)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for _ in range(12):
        result = algorithm.step(draft, head, rows, device)
        (result.numerator / result.denominator).backward()
        optimizer.step()
        optimizer.zero_grad()

    hits = training_hits(algorithm, draft, (head, device), rows)
    seen = compared(prompts, texts, hits, engine, algorithm.drafter(draft, head, device))
    assert len(seen) >= 15
    assert len(set(seen)) >= 3, f"the draft is too good or too bad to tell rounds apart: {seen}"
    figures = algorithm.step(draft, head, rows, device).sums
    assert int(figures["walk_rounds"]) == len(seen)
    assert figures["walk_hits"].tolist() == [sum(accepted > k for accepted in seen) for k in range(K)]
    simulated = algorithm.summarise(figures)["simulated_acceptance_length"]
    assert simulated == pytest.approx(1 + sum(seen) / len(seen), abs=1e-12)


def compared(
    prompts: Sequence[list[int]], texts: Sequence[list[int]], hits: list[list[int]], engine: object, drafter: object
) -> list[int]:
    """The accepted counts of all rounds inside a text, each of them what training says of its slot."""
    settings = DecodeSettings(max_new_tokens=max(map(len, texts)), draft_length=K)
    decoded = decode(engine, drafter, prompts, settings)  # type: ignore[arg-type]
    seen = []
    for row, (text, generation) in enumerate(zip(texts, decoded.generations, strict=True)):
        assert list(generation.tokens[: len(text)]) == text
        last = generation.prompt_tokens + len(text) - 1
        for at, entry in enumerate(generation.rounds):
            if entry.slot + 1 + K > last:
                continue
            assert entry.accepted == hits[row][entry.slot], (row, entry)
            if at + 1 < len(generation.rounds):
                assert generation.rounds[at + 1].slot == entry.slot + 1 + entry.accepted
            seen.append(entry.accepted)
    return seen
