"""Drafting against the training forward at the same anchors: the alignment that makes simulated acceptance real.

A text is written while it is drafted: every round takes some of the drafted tokens over and then departs from them, so
that all counts occur. The training forward over the finished text must say the same of the block at each anchor.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import DraftSession
from torchspec.core.interfaces.features import Features

Worlds = Callable[..., Any]


@pytest.fixture(autouse=True)
def _memory_that_is_not_a_number() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN: a cache that shows unwritten rows cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Text:
    """One sequence being written. `taps` exist for every position beforehand; they do not depend on the tokens.

    rounds   of each, its anchor, how many drafted tokens were taken over, and those
    """

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

    def write(self, drafted: list[int], accepted: int, vocabulary: int = 300) -> None:
        self.rounds.append((len(self.tokens) - 1, accepted, drafted))
        follow = drafted[accepted] if accepted < len(drafted) else 5
        self.tokens += [*drafted[:accepted], (follow + 1) % vocabulary]


def opened(world: Any, rows: int = 1) -> DraftSession:
    session: DraftSession = world.algorithm.drafter(world.draft, world.head, world.device).open(rows)
    return session


def write_all(world: Any, texts: Sequence[Text], seed: int) -> None:
    """Draft and write until every text is long enough; finished ones leave the session."""
    choose, steps = random.Random(seed), world.algorithm.geometry.block.steps
    session, alive = opened(world, len(texts)), list(texts)
    while alive:
        news = [text.news() for text in alive]
        proposal = session.propose([taps for taps, _ in news], [tokens for _, tokens in news], steps)
        assert proposal.probs_BLV is None
        for text, drafted in zip(alive, proposal.tokens_BL.tolist(), strict=True):
            text.write(drafted, choose.choice([0, 0, *range(steps + 1)]))
        keep = [place for place, text in enumerate(alive) if not text.done]
        if len(keep) < len(alive):
            session.keep(keep)
            alive = [alive[place] for place in keep]


def logits_at(world: Any, features: Features) -> dict[int, Tensor]:
    """[K, N] of the block at every anchor, by the training forward."""
    rows = FeatureRows.of([features], [torch.ones(len(features.input_ids_T), dtype=torch.bool)])
    batch = world.batch(rows)
    draft = world.draft
    with torch.no_grad():
        states_BAKH = draft.states(batch.inputs, world.head.embedding_VH, world.device)
        logits_AKN = draft.norm(states_BAKH, world.device.ops)[0] @ world.head.rows(draft.vocabulary.ids_N).T
    return {int(anchor): logits_AKN[a] for a, anchor in enumerate(batch.blocks.anchor_BA[0])}


def make_texts(world: Any, lengths: Sequence[int], limit: int) -> list[Text]:
    texts = []
    for n, length in enumerate(lengths):
        feature = world.features(world.tokens(limit + 20, n), n)
        texts.append(Text(tokens=world.tokens(length, n).tolist(), taps=feature.taps_TNH, limit=limit))
    return texts


OPTIONS: dict[str, dict[str, Any]] = {
    "whole vocabulary": {},
    "pruned": {"ids_N": torch.arange(0, 300, 3)},
    "from anchor": {"sample_from_anchor": True},
    "sliding": {"layer_types": ("sliding", "full"), "sliding_window": 7},
    "narrow, non-causal, from anchor": {
        "layer_types": ("full", "sliding"),
        "sliding_window": 3,
        "sliding_window_non_causal": True,
        "sample_from_anchor": True,
    },
}


@pytest.mark.parametrize("lengths", [(5,), (5, 12, 2)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_round_is_the_training_forwards_block(
    make_world: Worlds, lengths: Sequence[int], options: dict[str, Any]
) -> None:
    world = make_world(block_size=5, **options)
    steps, ids_N = world.algorithm.geometry.block.steps, world.draft.vocabulary.ids_N
    texts = make_texts(world, lengths, limit=90)
    write_all(world, texts, seed=len(lengths))
    for n, text in enumerate(texts):
        ids_T = torch.tensor(text.tokens)
        feature = replace(world.features(ids_T, n), taps_TNH=text.taps[: len(ids_T)])
        said = logits_at(world, feature)
        assert len(text.rounds) > 8
        assert {accepted for _, accepted, _ in text.rounds} == set(range(steps + 1))
        for (anchor, accepted, drafted), later in zip(text.rounds, [*text.rounds[1:], None], strict=True):
            assert ids_N[said[anchor].argmax(-1)].tolist() == drafted, anchor
            if later is not None:
                assert later[0] == anchor + 1 + accepted


def test_batched_drafts_are_those_of_single_rows(make_world: Worlds) -> None:
    world = make_world(block_size=5, ids_N=torch.arange(0, 300, 3))
    together, alone = make_texts(world, (5, 12, 2), 50), make_texts(world, (5, 12, 2), 50)
    session, singles = opened(world, 3), [opened(world) for _ in alone]
    for turn in range(5):
        news = [text.news() for text in together]
        generator = torch.Generator().manual_seed(turn)
        taps, tokens = [taps for taps, _ in news], [tokens for _, tokens in news]
        proposal = session.propose(taps, tokens, 4, temperature=1.0, generator=generator)
        assert proposal.probs_BLV is not None
        for n, text in enumerate(together):
            own_taps, own_tokens = alone[n].news()
            single = singles[n].propose([own_taps], [own_tokens], 4, temperature=1.0, generator=torch.Generator())
            torch.testing.assert_close(single.probs_BLV[0], proposal.probs_BLV[n], rtol=1e-9, atol=1e-15)
            drafted = proposal.tokens_BL[n].tolist()
            text.write(drafted, turn)
            alone[n].write(drafted, turn)


@pytest.mark.parametrize("options", [{}, {"sample_from_anchor": True}], ids=["behind the anchor", "from anchor"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_tokens_follow_the_probabilities_of_the_training_forward(
    make_world: Worlds, options: dict[str, Any], temperature: float
) -> None:
    ids = [3, 50, 77, 120, 200, 299]
    world = make_world(ids_N=torch.tensor(ids), **options)
    feature = world.features(world.tokens(12))
    rows, anchor = 3000, 9
    taps, tokens = feature.taps_TNH[:anchor], feature.input_ids_T[1 : anchor + 1]
    generator = torch.Generator().manual_seed(0)
    proposal = opened(world, rows).propose(
        [taps] * rows, [tokens] * rows, 10, temperature=temperature, generator=generator
    )
    probs = proposal.probs_BLV
    assert probs is not None
    want_KN = (logits_at(world, feature)[anchor] / temperature).softmax(-1)
    steps = len(want_KN)
    assert proposal.tokens_BL.shape == (rows, steps)
    torch.testing.assert_close(probs[..., ids], want_KN.expand(rows, -1, -1), rtol=1e-9, atol=1e-12)
    outside = [v for v in range(300) if v not in ids]
    assert float(probs[..., outside].abs().max()) == 0.0
    for k in range(steps):
        seen_N = torch.bincount(proposal.tokens_BL[:, k], minlength=300)[ids] / rows
        assert (seen_N - want_KN[k]).abs().max() < 4 * (0.25 / rows) ** 0.5


@pytest.mark.parametrize("from_anchor", [False, True])
def test_a_block_drafts_as_many_tokens_as_it_has_steps_or_fewer(make_world: Worlds, from_anchor: bool) -> None:
    world = make_world(sample_from_anchor=from_anchor, block_size=4)
    taps, tokens = make_texts(world, (9,), 20)[0].news()
    whole = opened(world).propose([taps], [tokens], 100).tokens_BL
    assert whole.shape == (1, 4 if from_anchor else 3)
    for length in range(whole.shape[1] + 1):
        assert torch.equal(opened(world).propose([taps], [tokens], length).tokens_BL, whole[:, :length])


def test_drafts_of_length_zero_still_take_in_what_was_confirmed(make_world: Worlds) -> None:
    world = make_world()
    taps, tokens = make_texts(world, (9,), 20)[0].news()
    split, whole = opened(world), opened(world)
    assert split.propose([taps[:5]], [tokens[:5]], 0).tokens_BL.shape == (1, 0)
    late = split.propose([taps[5:]], [tokens[5:]], 3)
    assert torch.equal(late.tokens_BL, whole.propose([taps], [tokens], 3).tokens_BL)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 50}], ids=["full", "sliding"])
def test_the_cache_grows(make_world: Worlds, options: dict[str, Any]) -> None:
    """Keys beyond the first reservation are the ones that one long prompt gives."""
    world = make_world(**options)
    feature = world.features(world.tokens(700, 1), 1)
    taps, tokens = feature.taps_TNH[:-1], feature.input_ids_T[1:]
    bit_by_bit = opened(world)
    for start in range(0, 600, 60):
        bit_by_bit.propose([taps[start : start + 60]], [tokens[start : start + 60]], 3)
    late = bit_by_bit.propose([taps[600:]], [tokens[600:]], 3)
    assert torch.equal(late.tokens_BL, opened(world).propose([taps], [tokens], 3).tokens_BL)


def test_a_full_row_beside_one_with_more_news(make_world: Worlds) -> None:
    """The fullest row confirms one position, another six: all are written six columns wide, beyond the first 256."""
    world = make_world()
    rows = [world.features(world.tokens(254, 1), 1), world.features(world.tokens(107, 2), 2)]
    session = opened(world, 2)
    for part in ([slice(0, 252), slice(0, 100)], [slice(252, 253), slice(100, 106)]):
        taps = [row.taps_TNH[where] for row, where in zip(rows, part, strict=True)]
        tokens = [row.input_ids_T[1:][where] for row, where in zip(rows, part, strict=True)]
        late = session.propose(taps, tokens, 3)
    for row, drafted_L in zip(rows, late.tokens_BL, strict=True):
        alone = opened(world).propose([row.taps_TNH[:-1]], [row.input_ids_T[1:]], 3)
        assert torch.equal(alone.tokens_BL[0], drafted_L)


def test_drafts_in_bfloat16_are_mostly_those_in_float32(make_world: Worlds) -> None:
    world, half = make_world(dtype=torch.float32), make_world(dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in world.draft.parameters():
            parameter.copy_(parameter.bfloat16())
        world.head.embedding_VH.copy_(world.head.embedding_VH.bfloat16())
        world.head.head_VH.copy_(world.head.head_VH.bfloat16())
    half.draft.load_state_dict(world.draft.state_dict())
    feature = world.features(world.tokens(60, 1), 1)
    probs = []
    for chosen in (world, half):
        proposal = opened(chosen).propose(
            [feature.taps_TNH[:-1]], [feature.input_ids_T[1:]], 3, temperature=1.0, generator=torch.Generator()
        )
        assert proposal.probs_BLV is not None
        assert proposal.probs_BLV.dtype == torch.float32
        probs.append(proposal.probs_BLV[0])
    assert (probs[0] - probs[1]).abs().max() < 0.03 * probs[0].max()
