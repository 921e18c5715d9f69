"""Decoding with drafts of blocks whose tokens are corrected by those before: on the embedded target, whose texts are
real greedy decoding, and on worlds with made-up features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchspec.core import registry
from torchspec.core.algorithms.blocks.batch import build_batch
from torchspec.core.decoding.generation import DecodeSettings
from torchspec.core.decoding.speculative import decode
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Moment
from torchspec.core.interfaces.engine import CaptureRequest, EngineOptions
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec, resolve_target

K = 4
COMMON: dict[str, Any] = {"num_layers": 1, "objective": {"cross_entropy": 1.0}}
PROMPTS = ([5, 70, 31, 900, 12, 44], [1200, 8, 8, 301], [77, 1999, 640, 3, 3, 3, 18, 250], [404, 1010, 55])
LIMIT = 24


class Decoding:
    """A draft on the embedded target that has learned the target's own texts in part."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        path = resolve_target("embedded")
        self.device = registry.load_device("cpu")
        self.engine = registry.load_engine("hf", EngineOptions(target=path, device=self.device, dtype="float32"))
        spec = read_target_spec(path)
        trained = registry.algorithms().spec(name)
        self.algorithm: Any = trained.create(trained.options(**COMMON, **options), spec)
        self.head = load_target_head(path, dtype=torch.float32, device=torch.device("cpu"))
        torch.manual_seed(0)
        self.draft: Any = self.algorithm.build_draft(VocabularyMap.identity(spec.vocab_size), self.head)
        self.texts = self.engine.generate([list(p) for p in PROMPTS], max_new_tokens=LIMIT)
        self.sequences = [[*prompt, *text] for prompt, text in zip(PROMPTS, self.texts, strict=True)]
        self.rows = FeatureRows.of(self._features(), self.masks)
        optimizer = torch.optim.AdamW(self.draft.parameters(), lr=5e-3)
        for step in range(10):
            moment = Moment(progress=step / 10)
            result = self.algorithm.step(self.draft, self.head, self.rows, self.device, moment=moment)
            (result.numerator / result.denominator).backward()
            optimizer.step()
            optimizer.zero_grad()

    @property
    def masks(self) -> list[Tensor]:
        return [
            torch.arange(len(sequence)) >= len(prompt) for prompt, sequence in zip(PROMPTS, self.sequences, strict=True)
        ]

    def _features(self) -> list[Features]:
        sink = MemoryStore()
        requests = [CaptureRequest(record_id=str(n), input_ids=ids) for n, ids in enumerate(self.sequences)]
        return [take(sink, found) for found in self.engine.capture(requests, self.algorithm.taps, sink)]

    def hits(self) -> list[dict[int, int]]:
        """Of every block, by its anchor: the leading steps whose first choice is the text's own token."""
        batch = build_batch(
            self.rows, self.algorithm.plan(self.head, 1 << 20), Moment(draws=tuple(range(len(PROMPTS))))
        )
        draft, inputs = self.draft, batch.inputs
        with torch.no_grad():
            states = draft.states(inputs, self.head.embedding_VH, self.device)
            normed = draft.norm(states, self.device.ops)
            feature = draft.correction.features(normed, inputs.before_BAK, self.head.embedding_VH)
            choice_BAK = (normed @ self.head.head_VH.T + feature @ draft.correction.map_NX.T).argmax(-1)
        found: list[dict[int, int]] = []
        for row, sequence in enumerate(self.sequences):
            found.append({})
            for block in batch.blocks.real_BA[row].nonzero()[:, 0].tolist():
                anchor = int(batch.blocks.anchor_BA[row, block])
                said, told = choice_BAK[row, block].tolist(), sequence[anchor + 1 : anchor + 1 + K]
                count = next((k for k, (a, b) in enumerate(zip(said, told, strict=False)) if a != b), len(told))
                found[row][anchor] = count
        return found

    def decoded(self, temperature: float = 0.0, seed: int = 0, **drafting: float) -> Any:
        """What is decoded with it; `drafting` are attributes of its drafter."""
        drafter = self.algorithm.drafter(self.draft, self.head, self.device)
        for name, value in drafting.items():
            setattr(drafter, name, value)
        settings = DecodeSettings(max_new_tokens=LIMIT, draft_length=K, temperature=temperature)
        return decode(self.engine, drafter, [list(p) for p in PROMPTS], settings, seed=seed).generations

    def check_rounds(self) -> None:
        """Every round accepts what the training forward says, and the text is the target's."""
        hits, seen = self.hits(), []
        for row, (prompt, generation) in enumerate(zip(PROMPTS, self.decoded(), strict=True)):
            assert list(generation.tokens) == self.texts[row]
            last = len(prompt) + len(self.texts[row]) - 1
            for entry in generation.rounds:
                anchor = entry.slot + 1
                if anchor + K > last:
                    break  # the end of the text is not the target's word
                assert entry.accepted == hits[row][anchor], (row, entry)
                seen.append(entry.accepted)
        assert len(seen) > 10
        assert len(set(seen)) >= 3, f"the draft is too good or too bad to tell rounds apart: {seen}"


def states_of(world: Any, feature: Features) -> Tensor:
    """[K, H] after the final norm of the block at the text's last token, by the training forward."""
    length = len(feature.input_ids_T)
    longer = torch.cat((feature.input_ids_T, torch.zeros(1, dtype=torch.int64)))
    text = world.features(longer)
    object.__setattr__(text, "taps_TNH", torch.cat((feature.taps_TNH, feature.taps_TNH[:1])))
    mask_T = torch.arange(length + 1) >= length - 1
    batch = world.batch(FeatureRows.of([text], [mask_T]))
    with torch.no_grad():
        states_BAKH = world.draft.states(batch.inputs, world.head.embedding_VH, world.device)
        normed: Tensor = world.draft.norm(states_BAKH, world.device.ops)[0, 0]
    assert int(batch.blocks.anchor_BA[0, 0]) == length - 1
    return normed
