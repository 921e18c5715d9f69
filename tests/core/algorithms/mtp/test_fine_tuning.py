"""What FastMTP is for: a head that was trained to predict one token, applied to its own output, drafts little; a short
fine-tuning of the same head over several steps makes it draft more. Measured by decoding, on prompts it has not seen.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from torchspec.core.algorithms.mtp.algorithm import Mtp
from torchspec.core.algorithms.mtp.options import MtpOptions
from torchspec.core.decoding.generation import DecodeSettings
from torchspec.core.decoding.speculative import decode
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.engine import CaptureRequest, EngineOptions
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec, resolve_target
from torchspec.core.registry import load_device, load_engine

CPU = torch.device("cpu")
ASKED = (
    "Write the function {} that returns the sum of two numbers.",
    "Write a method {}(self): Close the file.",
    "Write the function {}(path): Return the lines of a file.",
    "Write a class {} with the methods push and pop.",
    "Write the function {}(name): Return True if the name is valid.",
)
TRAINED, HELD_OUT = ("add", "close", "read", "Stack", "check", "merge"), ("total", "Queue")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the target that ships, in float32, to put a head into."""
    path = tmp_path_factory.mktemp("fine_tuning") / "target"
    shutil.copytree(resolve_target("embedded"), path)
    tensors = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float32", "num_nextn_predict_layers": 1}))
    return path


class Case:
    """The target's engine, its own texts, and prompts that are none of theirs."""

    def __init__(self, path: Path) -> None:
        self.path, self.device = path, load_device("cpu")
        self.spec = read_target_spec(path)
        self.head = load_target_head(path, dtype=torch.float32, device=CPU)
        self.engine = load_engine("hf", EngineOptions(target=path, device=self.device, dtype="float32"))
        tokenizer = AutoTokenizer.from_pretrained(path)

        def prompts(names: tuple[str, ...]) -> list[list[int]]:
            asked = [[{"role": "user", "content": a.format(name)}] for a in ASKED for name in names]
            return [tokenizer.apply_chat_template(a, add_generation_prompt=True, return_dict=False) for a in asked]

        self.held_out = prompts(HELD_OUT)
        self.answers = self.engine.generate(self.held_out, max_new_tokens=48)
        given = prompts(TRAINED)
        texts = self.engine.generate(given, max_new_tokens=48)
        self.sequences = [prompt + text for prompt, text in zip(given, texts, strict=True)]
        self.masks = [torch.arange(len(s)) >= len(p) for s, p in zip(self.sequences, given, strict=True)]

    def features(self, taps: tuple[int, ...]) -> list[Features]:
        sink = MemoryStore()
        requests = [CaptureRequest(record_id=str(at), input_ids=ids) for at, ids in enumerate(self.sequences)]
        return [take(sink, ref) for ref in self.engine.capture(requests, taps, sink)]

    def train(self, algorithm: Mtp, draft: Any, steps: int, lr: float) -> None:
        features = self.features(algorithm.taps)
        optimizer = torch.optim.AdamW(draft.parameters(), lr=lr)
        for step in range(steps):
            chosen = [(step * 10 + n) % len(features) for n in range(10)]
            rows = FeatureRows.of([features[n] for n in chosen], [self.masks[n] for n in chosen])
            result = algorithm.step(draft, self.head, rows, self.device)
            (result.numerator / result.denominator).backward()
            optimizer.step()
            optimizer.zero_grad()

    def acceptance_length(self, algorithm: Mtp, draft: Any) -> float:
        settings = DecodeSettings(max_new_tokens=48, draft_length=3)
        drafter = algorithm.drafter(draft, self.head, self.device)
        decoded = decode(self.engine, drafter, self.held_out, settings)
        assert [list(g.tokens) for g in decoded.generations] == self.answers
        accepted = [entry.accepted for g in decoded.generations for entry in g.rounds]
        return 1 + sum(accepted) / len(accepted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mimo", "deepseek"])
def test_fine_tuning_over_several_steps_accepts_more(bare: Path, tmp_path: Path, family: str) -> None:
    case, vocabulary = Case(bare), VocabularyMap.identity(2048)
    torch.manual_seed(0)
    one = Mtp.create(MtpOptions(init="random", family=family, unroll=1), case.spec)
    draft = one.build_draft(vocabulary, case.head)
    case.train(one, draft, steps=120, lr=3e-3)
    path = tmp_path / "target"
    shutil.copytree(bare, path)
    head = one.to_files(draft.state_dict(), "plain").tensors
    weights = path / "model.safetensors"
    save_file({**load_file(weights), **head}, weights, metadata={"format": "pt"})

    algorithm = Mtp.create(MtpOptions(), read_target_spec(path))
    assert algorithm.geometry.family == family
    # The same head as it is, trained on as it was before, and trained over several steps.
    untouched, further, own = (algorithm.build_draft(vocabulary, case.head) for _ in range(3))
    case.train(Mtp.create(MtpOptions(unroll=1), algorithm.target), further, steps=60, lr=1e-3)
    case.train(algorithm, own, steps=60, lr=1e-3)
    before, control, after = (case.acceptance_length(algorithm, each) for each in (untouched, further, own))
    print(f"{family}: acceptance length {before:.3f}, trained on for one token {control:.3f}, for several {after:.3f}")
    assert before > 1.2, "the head that it starts from drafts nothing"
    assert after > before + 0.1
    assert after > control + 0.05, "it is not the several steps that helped"
