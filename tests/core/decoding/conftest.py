"""A target whose distribution is known exactly, and drafters that are right as often as asked.

The target's logits depend on the whole prefix through a running hash, so that a cache rolled back by one token too
many or too few, or rows mixed up, changes what comes next. Its taps name their own position and token, so that a
drafter can check what it is handed.

Shape letters: B sequences, L drafted tokens, M hash states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Algorithm, Drafter, Proposal, StepResult
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import (
    CaptureRequest,
    EngineOptions,
    Prefill,
    StepOutput,
    TargetEngine,
    TargetSpec,
)
from torchspec.core.interfaces.features import Captured, Features, FeatureSink
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.registry import algorithms, load_device, load_engine

STATES = 4099


class HashTarget:
    """A TargetEngine over a table of logits [M, V], indexed by a hash of the whole prefix."""

    def __init__(self, logits_MV: Tensor, *, eos: tuple[int, ...] = (), context: int = 10_000) -> None:
        self.logits_MV = logits_MV
        self.vocab_size = logits_MV.shape[1]
        self.eos = eos
        self.context = context

    def state(self, prefix: Sequence[int]) -> int:
        state = 7
        for token in prefix:
            state = (state * 31 + token + 1) % self.logits_MV.shape[0]
        return state

    def logits(self, prefix: Sequence[int]) -> Tensor:
        return self.logits_MV[self.state(prefix)]

    def describe(self) -> TargetSpec:
        return TargetSpec(
            path=Path("hash-target"),
            architecture="HashTarget",
            model_type="hash",
            num_layers=1,
            hidden_size=2,
            intermediate_size=2,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-6,
            rope_parameters={},
            dtype=self.logits_MV.dtype,
            tie_word_embeddings=False,
            eos_token_ids=self.eos,
        )

    def open(self, prompts: Sequence[Sequence[int]], taps: Sequence[int]) -> HashSession:
        return HashSession(self, prompts, tuple(taps))

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        raise NotImplementedError("not part of these tests")

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """Written from the definition, one prompt and one token at a time: the oracle of greedy decoding."""
        generator = torch.Generator().manual_seed(seed)
        out = []
        for prompt in prompts:
            text = list(prompt)
            while len(text) - len(prompt) < max_new_tokens and len(text) < self.context:
                logits_V = self.logits(text)
                if temperature == 0.0:
                    text.append(int(logits_V.argmax()))
                else:
                    text.append(int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)))
                if text[-1] in self.eos:
                    break
            out.append(text[len(prompt) :])
        return out

    def close(self) -> None:
        pass


class HashSession:
    def __init__(self, target: HashTarget, prompts: Sequence[Sequence[int]], taps: tuple[int, ...]) -> None:
        self.target = target
        self.taps = taps
        self.rows = [list(prompt) for prompt in prompts]
        self.last_step = 0
        self.fed = 0
        logits = torch.stack([target.logits(row) for row in self.rows])
        self.prefill = Prefill(logits_BV=logits, taps=[self._taps(row, 0) for row in self.rows])

    def _taps(self, row: list[int], start: int) -> Tensor:
        facts = [[[float(at), float(row[at])]] * len(self.taps) for at in range(start, len(row))]
        return torch.tensor(facts).view(len(row) - start, len(self.taps), 2)

    def step(self, tokens_Bn: Tensor) -> StepOutput:
        assert tokens_Bn.shape[0] == len(self.rows)
        self.last_step = tokens_Bn.shape[1]
        logits, taps = [], []
        for row, tokens in zip(self.rows, tokens_Bn.tolist(), strict=True):
            start = len(row)
            for token in tokens:
                row.append(token)
                logits.append(self.target.logits(row))
            assert len(row) <= self.target.context, "fed beyond the context"
            taps.append(self._taps(row, start))
            self.fed += len(tokens)
        return StepOutput(
            logits_BnV=torch.stack(logits).view(len(self.rows), self.last_step, -1), taps_BnNH=torch.stack(taps)
        )

    def rollback(self, count_B: Tensor) -> None:
        for row, count in zip(self.rows, count_B.tolist(), strict=True):
            assert 0 <= count <= self.last_step
            del row[len(row) - count :]

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


class ScriptedDrafter:
    """Knows the target; right with a chosen probability, at temperature 0, else drafts from a q of its own.

    `mix` in [0, 1] is how much of q is the target's p, the rest being a fixed random distribution.
    With `one_hot` it drafts the argmax of q and names no distribution.
    `ragged` proposes a random number of tokens per row.
    """

    taps = (0,)

    def __init__(
        self, target: HashTarget, *, right: float = 0.5, mix: float = 0.5, one_hot: bool = False, ragged: bool = False
    ) -> None:
        self.target = target
        self.right = right
        self.mix = mix
        self.one_hot = one_hot
        self.ragged = ragged
        self.random = torch.Generator().manual_seed(5)
        self.own_MV = torch.randn(target.logits_MV.shape, generator=self.random, dtype=torch.float64).softmax(-1)

    def open(self, batch_size: int) -> ScriptedSession:
        return ScriptedSession(self, batch_size)

    def q(self, prefix: Sequence[int], temperature: float) -> Tensor:
        p_V = (self.target.logits(prefix).double() / temperature).softmax(-1)
        return self.mix * p_V + (1 - self.mix) * self.own_MV[self.target.state(prefix)]


class ScriptedSession:
    def __init__(self, drafter: ScriptedDrafter, batch_size: int) -> None:
        self.drafter = drafter
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]
        self.started = False

    def _take_in(self, taps: Sequence[Tensor], next_tokens: Sequence[Tensor]) -> None:
        """Every tap must be the next unseen position of the sequence, and its next token the one after it."""
        for row, taps_mNH, next_m in zip(self.rows, taps, next_tokens, strict=True):
            assert taps_mNH.shape == (len(next_m), 1, 2)
            positions, tokens = taps_mNH[:, 0, 0].long().tolist(), taps_mNH[:, 0, 1].long().tolist()
            if not row:
                row.append(tokens[0])
            assert positions == list(range(len(row) - 1, len(row) - 1 + len(next_m)))
            row.extend(next_m.tolist())
            assert tokens == row[-len(next_m) - 1 : -1]

    def propose(
        self,
        taps: Sequence[Tensor],
        next_tokens: Sequence[Tensor],
        length: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Proposal:
        self._take_in(taps, next_tokens)
        drafter, target = self.drafter, self.drafter.target
        tokens, probs = [], []
        for row in self.rows:
            text = list(row)
            for _ in range(length):
                if temperature == 0.0:
                    wrong = torch.rand((), generator=drafter.random) >= drafter.right
                    shift = int(torch.randint(1, target.vocab_size, (), generator=drafter.random)) if wrong else 0
                    text.append((int(target.logits(text).argmax()) + shift) % target.vocab_size)
                else:
                    q_V = drafter.q(text, temperature)
                    probs.append(q_V)
                    drawn = q_V.argmax() if drafter.one_hot else torch.multinomial(q_V, 1, generator=generator)
                    text.append(int(drawn))
            tokens.append(text[len(row) :])
        lengths_B = None
        if drafter.ragged:
            lengths_B = torch.randint(0, length + 1, (len(tokens),), generator=drafter.random)
        spoken = temperature > 0 and not drafter.one_hot
        return Proposal(
            tokens_BL=torch.tensor(tokens),
            probs_BLV=torch.stack(probs).view(len(tokens), length, -1) if spoken else None,
            lengths_B=lengths_B,
        )

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


@pytest.fixture
def make_target() -> Callable[..., HashTarget]:
    def make(seed: int, *, vocab: int = 13, states: int = STATES, **facts: object) -> HashTarget:
        generator = torch.Generator().manual_seed(seed)
        return HashTarget(torch.randn(states, vocab, generator=generator), **facts)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_drafter() -> type[ScriptedDrafter]:
    return ScriptedDrafter


@dataclass(kw_only=True)
class RealParts:
    """The hf engine over a target and a draft for it, float32 on the CPU, trained as far as asked."""

    engine: TargetEngine
    head: TargetHead
    device: Device
    algorithm: Algorithm
    draft: nn.Module
    context: int

    def drafter(self) -> Drafter:
        return self.algorithm.drafter(self.draft, self.head, self.device)

    def features(self, sequences: Sequence[Sequence[int]]) -> list[Features]:
        sink = MemoryStore()
        requests = [CaptureRequest(record_id=str(at), input_ids=ids) for at, ids in enumerate(sequences)]
        return [take(sink, ref) for ref in self.engine.capture(requests, self.algorithm.taps, sink)]

    def step(self, sequences: Sequence[Sequence[int]], masks: Sequence[Tensor]) -> StepResult:
        return self.algorithm.step(self.draft, self.head, FeatureRows.of(self.features(sequences), masks), self.device)

    def train(self, sequences: Sequence[Sequence[int]], masks: Sequence[Tensor], steps: int, lr: float = 3e-3) -> None:
        rows = FeatureRows.of(self.features(sequences), masks)
        optimizer = torch.optim.AdamW(self.draft.parameters(), lr=lr)
        for _ in range(steps):
            result = self.algorithm.step(self.draft, self.head, rows, self.device)
            (result.numerator / result.denominator).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(scope="session")
def make_parts() -> Callable[..., RealParts]:
    """make_parts(target, kind="eagle3", ids_N=..., **options of the draft): an untrained draft on a target's engine."""

    def make(
        path: Path, *, kind: str = "eagle3", ids_N: Tensor | None = None, seed: int = 0, **options: Any
    ) -> RealParts:
        device = load_device("cpu")
        spec, target = algorithms().spec(kind), read_target_spec(path)
        vocabulary = VocabularyMap.identity(target.vocab_size)
        if ids_N is not None:
            vocabulary = VocabularyMap(ids_N=ids_N, target_size=target.vocab_size)
        algorithm = spec.create(spec.options(vocab_size=vocabulary.size, **options), target)
        head = load_target_head(path, dtype=torch.float32, device=torch.device("cpu"))
        torch.manual_seed(seed)
        return RealParts(
            engine=load_engine("hf", EngineOptions(target=path, device=device, dtype="float32")),
            head=head,
            device=device,
            algorithm=algorithm,
            draft=algorithm.build_draft(vocabulary, head),
            context=target.max_position_embeddings,
        )

    return make
