"""Drafting against the training forward at the same slots: the alignment that makes simulated acceptance real.

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

from torchspec.core.algorithms.eagle3 import drafter
from torchspec.core.algorithms.eagle3.batch import Plan, build_batch
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import DraftSession
from torchspec.core.interfaces.features import Features
from torchspec.core.objectives.acceptance import first_rounds, prefix_lengths, walked_slots, whole_slots

Worlds = Callable[..., Any]
STEPS = 4


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
    limit: int
    rounds: list[tuple[int, int, list[int]]] = field(default_factory=list)
    confirmed: int = 0

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.limit

    def news(self) -> tuple[Tensor, Tensor]:
        """Taps of the newly confirmed positions, and the token after each."""
        start, stop = self.confirmed, len(self.tokens) - 1
        self.confirmed = stop
        return self.taps[start:stop], torch.tensor(self.tokens[start + 1 : stop + 1])

    def write(self, drafted: list[int], accepted: int, vocabulary: int) -> None:
        self.rounds.append((len(self.tokens) - 2, accepted, drafted))
        follow = drafted[accepted] if accepted < len(drafted) else 5
        self.tokens += [*drafted[:accepted], (follow + 1) % vocabulary]


def write_all(world: Any, texts: Sequence[Text], seed: int) -> None:
    """Draft and write until every text is long enough; finished ones leave the session."""
    choose = random.Random(seed)
    session: DraftSession = world.algorithm.drafter(world.draft, world.head, world.device).open(len(texts))
    alive = list(texts)
    while alive:
        news = [text.news() for text in alive]
        proposal = session.propose([taps for taps, _ in news], [tokens for _, tokens in news], STEPS)
        assert proposal.probs_BLV is None
        for text, drafted in zip(alive, proposal.tokens_BL.tolist(), strict=True):
            text.write(drafted, choose.choice([0, 0, 1, 2, 3, 4, 4]), world.algorithm.geometry.vocab_size)
        keep = [place for place, text in enumerate(alive) if not text.done]
        if len(keep) < len(alive):
            session.keep(keep)
            alive = [alive[place] for place in keep]


def predictions(world: Any, features: Features) -> Tensor:
    """The training forward's first choice at every slot and step, [T, K] target ids (slots that cannot be are -1)."""
    length = len(features.input_ids_T)
    plan = Plan(steps=STEPS, chunk_rows=128, device=torch.device("cpu"))
    batch = build_batch(FeatureRows.of([features], [torch.ones(length, dtype=torch.bool)]), plan)
    draft = world.draft
    outputs = draft.unroll(batch.inputs, draft.embedding(world.head.embedding_VH), STEPS, world.device)
    found = torch.full((length, STEPS), -1)
    for k, out in enumerate(outputs):
        best = draft.lm_head(draft.norm(out, world.device.ops)).argmax(-1)
        for q, i in enumerate(batch.inputs.slots.index_BQ[0].tolist()):
            found[i, k] = draft.vocabulary.ids_N[best[0, q]] if i + 2 + k < length else -1
    return found


def make_texts(world: Any, lengths: Sequence[int], limit: int) -> list[Text]:
    texts = []
    for n, length in enumerate(lengths):
        feature = world.features(world.tokens(limit + 2 * STEPS, n), n)
        texts.append(Text(tokens=world.tokens(length, n).tolist(), taps=feature.taps_TNH, limit=limit))
    return texts


@pytest.mark.parametrize("lengths", [(5,), (5, 12, 2), (4, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ids_N": torch.arange(0, 300, 3)},
        {"norm_before_residual": True, "draft_config": {"hidden_size": 32}},
        {"fc_norm": True, "norm_output": False},
        {"fc_norm": False, "norm_output": True},
        {"fc_norm": False, "norm_before_fc": True},
        {"fc_norm": True, "norm_before_residual": True, "draft_config": {"hidden_size": 32}},
        {"attention": "mla"},
        {"attention": "mla", "fc_norm": True, "v_head_dim": 16, "draft_config": {"hidden_size": 32}},
    ],
    ids=[
        "whole_vocabulary", "pruned", "own_embedding", "tap_norms", "output_norm", "norm_of_all_taps",
        "both_norms_own_embedding", "latent", "latent_both_norms_own_embedding",
    ],
)  # fmt: skip
def test_every_round_is_the_training_forwards_prefix(
    make_world: Worlds, lengths: Sequence[int], options: dict[str, Any]
) -> None:
    world = make_world(unroll=STEPS, **options)
    texts = make_texts(world, lengths, limit=60)
    write_all(world, texts, seed=len(lengths))
    for n, text in enumerate(texts):
        ids_T = torch.tensor(text.tokens)
        feature = world.features(ids_T, n)
        feature = Features(**(vars(feature) | {"taps_TNH": text.taps[: len(ids_T)]}))
        best_TK = predictions(world, feature)
        agree_TK = torch.zeros_like(best_TK, dtype=torch.bool)
        for k in range(STEPS):
            agree_TK[: len(ids_T) - 2 - k, k] = best_TK[: len(ids_T) - 2 - k, k] == ids_T[2 + k :]
        accepted_T = prefix_lengths(agree_TK[None])[0]
        last = len(ids_T) - 1
        whole_rounds = [r for r in text.rounds if r[0] + 1 + STEPS <= last]
        assert len(whole_rounds) > 8
        assert {accepted for _, accepted, _ in text.rounds} == set(range(STEPS + 1))
        for (slot, accepted, drafted), later in zip(text.rounds, [*text.rounds[1:], None], strict=True):
            for k in range(min(accepted + 1, STEPS)):
                if slot + 2 + k <= last:
                    assert int(best_TK[slot, k]) == drafted[k], (slot, k)
            if slot + 1 + STEPS <= last:
                assert int(accepted_T[slot]) == accepted
            if later is not None:
                assert later[0] == slot + 1 + accepted
        # The prompt's last token is where the target's own first one follows it.
        mask = (torch.arange(len(ids_T)) >= lengths[n] - 1)[None]
        document = torch.zeros_like(mask, dtype=torch.int64)
        walked = walked_slots(accepted_T[None], first_rounds(mask, document), whole_slots(mask, document, STEPS))
        assert walked[0].nonzero()[:, 0].tolist() == [slot for slot, _, _ in whole_rounds]


def test_a_draft_whose_table_of_embeddings_would_be_large_drafts_the_same(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(unroll=STEPS, ids_N=torch.arange(0, 300, 3))
    taps, tokens = make_texts(world, (9,), 20)[0].news()

    def drafted() -> Tensor:
        session = world.algorithm.drafter(world.draft, world.head, world.device).open(1)
        probs = session.propose([taps], [tokens], STEPS, temperature=1.0, generator=torch.Generator().manual_seed(0))
        assert probs.probs_BLV is not None
        return probs.probs_BLV

    with_table = drafted()
    monkeypatch.setattr(drafter, "SHARES_BYTES", 0)
    assert drafter.DraftWeights.of(world.draft, world.head).embedded_NZ is None
    torch.testing.assert_close(drafted(), with_table, rtol=1e-12, atol=1e-15)


def test_batched_drafts_are_those_of_single_rows(make_world: Worlds) -> None:
    world = make_world(unroll=STEPS, ids_N=torch.arange(0, 300, 3))
    together, alone = make_texts(world, (5, 12, 2), 50), make_texts(world, (5, 12, 2), 50)
    session = world.algorithm.drafter(world.draft, world.head, world.device).open(3)
    singles = [world.algorithm.drafter(world.draft, world.head, world.device).open(1) for _ in alone]
    for turn in range(5):
        news = [text.news() for text in together]
        proposal = session.propose(
            [t for t, _ in news],
            [n for _, n in news],
            STEPS,
            temperature=1.0,
            generator=torch.Generator().manual_seed(turn),
        )
        assert proposal.probs_BLV is not None
        for n, text in enumerate(together):
            drafted = proposal.tokens_BL[n].tolist()
            taps, tokens = alone[n].news()
            single = singles[n].propose([taps], [tokens], 1, temperature=1.0, generator=torch.Generator())
            torch.testing.assert_close(single.probs_BLV[0, 0], proposal.probs_BLV[n, 0], rtol=1e-9, atol=1e-15)
            text.write(drafted, turn % (STEPS + 1), 300)
            alone[n].write(drafted, turn % (STEPS + 1), 300)


def test_sampled_tokens_follow_the_probabilities_that_are_returned(make_world: Worlds) -> None:
    world = make_world(unroll=STEPS, ids_N=torch.tensor([3, 50, 77, 120, 200, 299]), dtype=torch.float32)
    text = make_texts(world, (9,), 20)[0]
    taps, tokens = text.news()
    rows, temperature = 4000, 0.7
    session = world.algorithm.drafter(world.draft, world.head, world.device).open(rows)
    generator = torch.Generator().manual_seed(0)
    proposal = session.propose([taps] * rows, [tokens] * rows, 2, temperature=temperature, generator=generator)
    probs, drawn = proposal.probs_BLV, proposal.tokens_BL
    assert probs is not None
    assert probs.shape == (rows, 2, 300)
    torch.testing.assert_close(probs.sum(-1), torch.ones(rows, 2))
    outside = [v for v in range(300) if v not in world.draft.vocabulary.ids_N.tolist()]
    assert float(probs[..., outside].abs().max()) == 0.0
    observed = torch.bincount(drawn[:, 0], minlength=300) / rows
    assert (observed - probs[0, 0]).abs().max() < 4 * (0.25 / rows) ** 0.5
    # The second token's distribution depends on the first one drawn, and belongs to it.
    for first in drawn[:, 0].unique().tolist():
        chosen = drawn[:, 0] == first
        torch.testing.assert_close(
            probs[chosen, 1], probs[chosen, 1][:1].expand(int(chosen.sum()), -1), rtol=1e-4, atol=1e-6
        )
    # At a temperature, the probabilities are those of the logits divided by it.
    greedy = world.algorithm.drafter(world.draft, world.head, world.device).open(1)
    cold = greedy.propose([taps], [tokens], 1, temperature=1.0, generator=generator).probs_BLV
    assert cold is not None
    ids = world.draft.vocabulary.ids_N
    ratio = probs[0, 0, ids].log() * temperature - cold[0, 0, ids].log()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-4)


def test_drafts_of_length_zero_still_take_in_what_was_confirmed(make_world: Worlds) -> None:
    world = make_world(unroll=STEPS)
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    text = make_texts(world, (9,), 20)[0]
    taps, tokens = text.news()
    split, whole = drafter.open(1), drafter.open(1)
    assert split.propose([taps[:5]], [tokens[:5]], 0).tokens_BL.shape == (1, 0)
    late = split.propose([taps[5:]], [tokens[5:]], STEPS)
    assert torch.equal(late.tokens_BL, whole.propose([taps], [tokens], STEPS).tokens_BL)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_the_cache_grows(make_world: Worlds, attention: str) -> None:
    """Keys and rotary rows beyond the first reservation are the ones that one long prompt gives."""
    world = make_world(unroll=STEPS, attention=attention)
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    feature = world.features(world.tokens(700, 1), 1)
    taps, tokens = feature.taps_TNH[:-1], feature.input_ids_T[1:]
    bit_by_bit, at_once = drafter.open(1), drafter.open(1)
    for start in range(0, 600, 60):
        bit_by_bit.propose([taps[start : start + 60]], [tokens[start : start + 60]], STEPS)
    late = bit_by_bit.propose([taps[600:]], [tokens[600:]], STEPS)
    assert torch.equal(late.tokens_BL, at_once.propose([taps], [tokens], STEPS).tokens_BL)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_full_row_beside_one_with_more_news(make_world: Worlds, attention: str) -> None:
    """The fullest row confirms one position, another six: all are written six columns wide, beyond the first 256."""
    world = make_world(unroll=STEPS, attention=attention)
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    rows = [world.features(world.tokens(254, 1), 1), world.features(world.tokens(107, 2), 2)]
    session = drafter.open(2)
    before, after = [slice(0, 252), slice(0, 100)], [slice(252, 253), slice(100, 106)]
    for part, length in ((before, 4), (after, 3)):
        taps = [row.taps_TNH[where] for row, where in zip(rows, part, strict=True)]
        tokens = [row.input_ids_T[1:][where] for row, where in zip(rows, part, strict=True)]
        late = session.propose(taps, tokens, length)
    for row, drafted_L in zip(rows, late.tokens_BL, strict=True):
        alone = drafter.open(1).propose([row.taps_TNH[:-1]], [row.input_ids_T[1:]], 3)
        assert torch.equal(alone.tokens_BL[0], drafted_L)
