"""Drafting against the training forward at the same slots, and real decoding with a head.

A text is written while it is drafted: every round takes some of the drafted tokens over and then departs from them, so
that all counts occur. The training forward over the finished text must see the same prefixes at the same slots.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.algorithms.eagle3.batch import Plan, build_batch
from torchspec.core.decoding.generation import DecodeSettings
from torchspec.core.decoding.speculative import decode
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.engine import CaptureRequest, EngineOptions
from torchspec.core.interfaces.features import Features
from torchspec.core.registry import load_engine

Worlds = Callable[..., Any]
STEPS = 4
CASES = (("mimo", "qwen2"), ("deepseek", "llama"), ("qwen", "qwen3"))


@pytest.fixture(autouse=True)
def _memory_that_is_not_a_number() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN: a cache that shows unwritten rows cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Text:
    """One sequence being written. `taps` exist for every position beforehand; they do not depend on the tokens."""

    tokens: list[int]
    taps: Tensor
    rounds: list[tuple[int, int, list[int]]] = field(default_factory=list)
    confirmed: int = 0

    def news(self) -> tuple[Tensor, Tensor]:
        """Taps of the newly confirmed positions, and the token after each."""
        start, stop = self.confirmed, len(self.tokens) - 1
        self.confirmed = stop
        return self.taps[start:stop], torch.tensor(self.tokens[start + 1 : stop + 1])

    def write(self, drafted: list[int], accepted: int) -> None:
        self.rounds.append((len(self.tokens) - 2, accepted, drafted))
        follow = drafted[accepted] if accepted < len(drafted) else 5
        self.tokens += [*drafted[:accepted], (follow + 1) % 120]


def make_texts(world: Any, lengths: Sequence[int], limit: int) -> list[Text]:
    return [
        Text(tokens=world.tokens(length, n).tolist(), taps=world.features(world.tokens(limit + 9, n), n).taps_TNH)
        for n, length in enumerate(lengths)
    ]


def predictions(world: Any, features: Features) -> Tensor:
    """The training forward's first choice at every slot and step, [T, K]; -1 where there is no such token."""
    length = len(features.input_ids_T)
    plan = Plan(steps=STEPS, chunk_rows=128, device=torch.device("cpu"))
    batch = build_batch(FeatureRows.of([features], [torch.ones(length, dtype=torch.bool)]), plan)
    found_TK = torch.full((length, STEPS), -1)
    slots = batch.inputs.slots.index_BQ[0]

    def first_choices(outputs: list[Tensor], head: Any) -> dict[str, Tensor]:
        normed = [torch.nn.functional.rms_norm(out, head.norm_H.shape, head.norm_H, head.eps) for out in outputs]
        return {str(k): (normed_QH @ head.head_NH.T).argmax(-1) for k, normed_QH in enumerate(normed)}

    inputs = batch.inputs
    if world.algorithm.geometry.family != "mimo":
        inputs = type(inputs)(**(vars(inputs) | {"taps_BSF": world.head.normed(inputs.taps_BSF, "pre_norm")}))
    with torch.no_grad():
        chosen = world.draft(inputs, world.head, STEPS, world.device, first_choices)
    for k in range(STEPS):
        reached = slots[slots + 2 + k < length]
        found_TK[reached, k] = chosen[str(k)][: len(reached)]
    return found_TK


@pytest.mark.parametrize("lengths", [(5,), (5, 12, 2)])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_round_is_the_training_forwards_prefix(
    make_world: Worlds, family: str, kind: str, lengths: Sequence[int]
) -> None:
    world, limit = make_world(family, kind, unroll=STEPS), 45
    texts, choose = make_texts(world, lengths, limit), random.Random(len(lengths))
    session = world.algorithm.drafter(world.draft, world.head, world.device).open(len(texts))
    alive = list(texts)
    while alive:
        news = [text.news() for text in alive]
        proposal = session.propose([taps for taps, _ in news], [tokens for _, tokens in news], STEPS)
        assert proposal.probs_BLV is None
        for text, drafted in zip(alive, proposal.tokens_BL.tolist(), strict=True):
            text.write(drafted, choose.choice([0, 0, 1, 2, 3, 4, 4]))
        keep = [place for place, text in enumerate(alive) if len(text.tokens) < limit]
        if len(keep) < len(alive):
            session.keep(keep)
            alive = [alive[place] for place in keep]
    for n, text in enumerate(texts):
        ids_T = torch.tensor(text.tokens)
        feature = Features(**(vars(world.features(ids_T, n)) | {"taps_TNH": text.taps[: len(ids_T)]}))
        best_TK, last = predictions(world, feature), len(ids_T) - 1
        assert len(text.rounds) > 6
        compared = 0
        for slot, accepted, drafted in text.rounds:
            for k in range(min(accepted + 1, STEPS)):
                if slot + 2 + k <= last:
                    assert int(best_TK[slot, k]) == drafted[k], (slot, k)
                    compared += 1
        assert compared > 12


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_decoding_is_lossless_and_accepts_what_training_counts(make_world: Worlds, family: str, kind: str) -> None:
    """On the target's own greedy text: each round accepts the prefix that the training forward hits at its slot."""
    world = make_world(family, kind, dtype=torch.float32, unroll=STEPS)
    engine = load_engine("hf", EngineOptions(target=world.algorithm.target.path, device=world.device, dtype="float32"))
    prompts = [world.tokens(n, n).tolist() for n in (3, 9, 6, 2)]
    texts = engine.generate(prompts, max_new_tokens=30)
    sequences = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    sink = MemoryStore()
    requests = [CaptureRequest(record_id=str(at), input_ids=ids) for at, ids in enumerate(sequences)]
    features = [take(sink, ref) for ref in engine.capture(requests, world.algorithm.taps, sink)]
    # An untrained head is hardly ever right: some steps on these texts.
    rows = FeatureRows.of(features, [torch.arange(len(s)) >= len(p) for s, p in zip(sequences, prompts, strict=True)])
    optimizer = torch.optim.AdamW(world.draft.parameters(), lr=5e-3)
    for _ in range(25):
        result = world.algorithm.step(world.draft, world.head, rows, world.device)
        (result.numerator / result.denominator).backward()
        optimizer.step()
        optimizer.zero_grad()
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    decoded = decode(engine, drafter, prompts, DecodeSettings(max_new_tokens=30, draft_length=STEPS))
    accepted: list[int] = []
    for feature, text, prompt, generation in zip(features, texts, prompts, decoded.generations, strict=True):
        assert list(generation.tokens) == text
        best_TK, last = predictions(world, feature), len(prompt) + len(text) - 1
        ids = feature.input_ids_T.tolist()
        for entry in generation.rounds:
            if entry.slot + 1 + STEPS > last:
                continue
            hits = [int(best_TK[entry.slot, k]) == ids[entry.slot + 2 + k] for k in range(STEPS)]
            assert entry.accepted == (hits.index(False) if False in hits else STEPS)
            accepted.append(entry.accepted)
    assert len(set(accepted)) > 2


def test_batched_drafts_are_those_of_single_rows(make_world: Worlds) -> None:
    world = make_world("deepseek", "llama")
    together, alone = make_texts(world, (5, 12, 2), 50), make_texts(world, (5, 12, 2), 50)
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    session, singles = drafter.open(3), [drafter.open(1) for _ in alone]
    for turn in range(5):
        news = [text.news() for text in together]
        chance = torch.Generator().manual_seed(turn)
        proposal = session.propose([t for t, _ in news], [n for _, n in news], STEPS, temperature=1.0, generator=chance)
        assert proposal.probs_BLV is not None
        for n, text in enumerate(together):
            drafted = proposal.tokens_BL[n].tolist()
            taps, tokens = alone[n].news()
            single = singles[n].propose([taps], [tokens], 1, temperature=1.0, generator=torch.Generator())
            torch.testing.assert_close(single.probs_BLV[0, 0], proposal.probs_BLV[n, 0], rtol=1e-9, atol=1e-15)
            text.write(drafted, turn % (STEPS + 1))
            alone[n].write(drafted, turn % (STEPS + 1))


def test_sampled_tokens_follow_the_probabilities_that_are_returned(make_world: Worlds) -> None:
    world = make_world("mimo", "qwen2", dtype=torch.float32)
    taps, tokens = make_texts(world, (9,), 20)[0].news()
    rows, temperature = 4000, 0.7
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    chance = torch.Generator().manual_seed(0)
    proposal = drafter.open(rows).propose([taps] * rows, [tokens] * rows, 2, temperature=temperature, generator=chance)
    probs, drawn = proposal.probs_BLV, proposal.tokens_BL
    assert probs is not None
    assert probs.shape == (rows, 2, 120)
    torch.testing.assert_close(probs.sum(-1), torch.ones(rows, 2))
    observed = torch.bincount(drawn[:, 0], minlength=120) / rows
    assert (observed - probs[0, 0]).abs().max() < 4 * (0.25 / rows) ** 0.5
    # The second token's distribution depends on the first one drawn, and belongs to it.
    for first in drawn[:, 0].unique().tolist()[:20]:
        second = probs[drawn[:, 0] == first, 1]
        torch.testing.assert_close(second, second[:1].expand_as(second), rtol=1e-4, atol=1e-6)
    # At a temperature, the probabilities are those of the logits divided by it.
    cold = drafter.open(1).propose([taps], [tokens], 1, temperature=1.0, generator=chance).probs_BLV
    assert cold is not None
    ratio = probs[0, 0].log() * temperature - cold[0, 0].log()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-4)


def test_the_cache_grows_and_takes_a_prompt_in_parts(make_world: Worlds) -> None:
    world = make_world("mimo", "qwen2")
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    feature = world.features(world.tokens(400, 1), 1)
    taps, tokens = feature.taps_TNH[:-1], feature.input_ids_T[1:]
    bit_by_bit, at_once = drafter.open(1), drafter.open(1)
    assert bit_by_bit.propose([taps[:5]], [tokens[:5]], 0).tokens_BL.shape == (1, 0)
    for start in range(5, 365, 60):
        bit_by_bit.propose([taps[start : start + 60]], [tokens[start : start + 60]], STEPS)
    late = bit_by_bit.propose([taps[365:]], [tokens[365:]], STEPS)
    assert torch.equal(late.tokens_BL, at_once.propose([taps], [tokens], STEPS).tokens_BL)


def test_a_full_row_beside_one_with_more_news(make_world: Worlds) -> None:
    """The fullest row confirms one position, another six: all are written six columns wide, beyond the first 256."""
    world = make_world("mimo", "qwen2")
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    rows = [world.features(world.tokens(254, 1), 1), world.features(world.tokens(107, 2), 2)]
    session = drafter.open(2)
    for part, length in ((slice(0, 252), slice(0, 100)), 4), ((slice(252, 253), slice(100, 106)), 3):
        taps = [row.taps_TNH[where] for row, where in zip(rows, part, strict=True)]
        tokens = [row.input_ids_T[1:][where] for row, where in zip(rows, part, strict=True)]
        late = session.propose(taps, tokens, length)
    for row, drafted_L in zip(rows, late.tokens_BL, strict=True):
        alone = drafter.open(1).propose([row.taps_TNH[:-1]], [row.input_ids_T[1:]], 3)
        assert torch.equal(alone.tokens_BL[0], drafted_L)
