"""Drafting against the training forward at the same slots, with every element kept.

A text is written while it is drafted: every round takes some of the drafted tokens over and then departs from them, so
that all counts occur. The training forward over the finished text must say the same at the same slots, at every depth:
what a depth says does not depend on what was drafted before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.algorithms.peagle.batch import Plan, build_batch
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import START, DraftSession
from torchspec.core.interfaces.features import Features

Worlds = Callable[..., Any]
DEPTHS = 4


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
    rounds: list[tuple[int, list[int]]] = field(default_factory=list)
    confirmed: int = 0

    def news(self) -> tuple[Tensor, Tensor]:
        """Taps of the newly confirmed positions, and the token after each."""
        start, stop = self.confirmed, len(self.tokens) - 1
        self.confirmed = stop
        return self.taps[start:stop], torch.tensor(self.tokens[start + 1 : stop + 1])

    def write(self, drafted: list[int], accepted: int) -> None:
        self.rounds.append((len(self.tokens) - 2, drafted))
        follow = drafted[accepted] if accepted < len(drafted) else 5
        self.tokens += [*drafted[:accepted], (follow + 1) % 300]


def make_texts(world: Any, lengths: Sequence[int], limit: int) -> list[Text]:
    texts = []
    for n, length in enumerate(lengths):
        feature = world.features(world.tokens(limit + 2 * DEPTHS, n), n)
        texts.append(Text(tokens=world.tokens(length, n).tolist(), taps=feature.taps_TNH, limit=limit))
    return texts


def write_all(world: Any, texts: Sequence[Text], seed: int) -> None:
    """Draft and write until every text is long enough; finished ones leave the session."""
    choose = random.Random(seed)
    session: DraftSession = world.algorithm.drafter(world.draft, world.head, world.device).open(len(texts))
    alive = list(texts)
    while alive:
        news = [text.news() for text in alive]
        proposal = session.propose([taps for taps, _ in news], [tokens for _, tokens in news], DEPTHS)
        assert proposal.probs_BLV is None
        for text, drafted in zip(alive, proposal.tokens_BL.tolist(), strict=True):
            text.write(drafted, choose.choice([0, 0, 1, 2, 3, 4, 4]))
        keep = [place for place, text in enumerate(alive) if len(text.tokens) < text.limit]
        if len(keep) < len(alive):
            session.keep(keep)
            alive = [alive[place] for place in keep]


def predictions(world: Any, features: Features) -> Tensor:
    """The training forward's first choice at every anchor and depth, [T, K] target ids (-1 where there is none)."""
    length = len(features.input_ids_T)
    plan = Plan(sampling=world.algorithm.sampling, chunk_rows=128, device=torch.device("cpu"))
    batch = build_batch(FeatureRows.of([features], [torch.ones(length, dtype=torch.bool)]), plan, START)
    outputs = world.draft.states(batch.inputs, world.head.embedding_VH, world.device)
    found = torch.full((length, DEPTHS), -1)
    slots = torch.split(batch.pairs.slot_M, list(batch.pairs.sizes))
    cells = torch.split(batch.pairs.cell_M, list(batch.pairs.sizes))
    for out_BQH, slot_m, cell_m in zip(outputs, slots, cells, strict=True):
        logits = world.draft.lm_head(world.draft.norm(out_BQH.flatten(0, 1)[slot_m], world.device.ops))
        found.view(-1)[cell_m] = world.draft.vocabulary.ids_N[logits.argmax(-1)]
    return found


@pytest.mark.parametrize("lengths", [(5,), (5, 12, 2)])
@pytest.mark.parametrize(
    "options",
    [{"num_layers": 3}, {"ids_N": torch.arange(0, 300, 3), "num_layers": 1},
     {"norm_before_residual": True, "hidden_size": 32, "num_layers": 2, "mask_token": 7}],
    ids=["three_layers", "one_layer_pruned", "own_embedding"],
)  # fmt: skip
def test_every_round_is_what_the_training_forward_says(
    make_world: Worlds, lengths: Sequence[int], options: dict[str, Any]
) -> None:
    world = make_world(depths=DEPTHS, depth_ratio=1.0, **options)
    texts = make_texts(world, lengths, limit=50)
    write_all(world, texts, seed=len(lengths))
    compared = 0
    for n, text in enumerate(texts):
        feature = world.features(torch.tensor(text.tokens), n)
        feature = Features(**(vars(feature) | {"taps_TNH": text.taps[: len(text.tokens)]}))
        best_TK = predictions(world, feature)
        for slot, drafted in text.rounds:
            known = [depth for depth in range(DEPTHS) if slot + 2 + depth < len(text.tokens)]
            assert [drafted[depth] for depth in known] == best_TK[slot, : len(known)].tolist()
            compared += len(known)
    assert compared > 40 * len(lengths)


def test_batched_drafts_are_those_of_single_rows(make_world: Worlds) -> None:
    world = make_world(depths=DEPTHS, num_layers=2, ids_N=torch.arange(0, 300, 3))
    together, alone = make_texts(world, (5, 12, 2), 50), make_texts(world, (5, 12, 2), 50)
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    session, singles = drafter.open(3), [drafter.open(1) for _ in alone]
    for turn in range(5):
        sampled: dict[str, Any] = {"temperature": 1.0, "generator": torch.Generator().manual_seed(turn)}
        news = [text.news() for text in together]
        proposal = session.propose([t for t, _ in news], [n for _, n in news], DEPTHS, **sampled)
        assert proposal.probs_BLV is not None
        for n, text in enumerate(together):
            drafted = proposal.tokens_BL[n].tolist()
            taps, tokens = alone[n].news()
            single = singles[n].propose([taps], [tokens], DEPTHS, **sampled)
            torch.testing.assert_close(single.probs_BLV[0], proposal.probs_BLV[n], rtol=1e-9, atol=1e-15)
            text.write(drafted, turn % (DEPTHS + 1))
            alone[n].write(drafted, turn % (DEPTHS + 1))


def test_sampled_tokens_follow_the_probabilities_that_are_returned(make_world: Worlds) -> None:
    ids = [3, 50, 77, 120, 200, 299]
    world = make_world(depths=DEPTHS, num_layers=2, ids_N=torch.tensor(ids), dtype=torch.float32)
    taps, tokens = make_texts(world, (9,), 20)[0].news()
    rows, temperature = 4000, 0.7
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    generator = torch.Generator().manual_seed(0)
    proposal = drafter.open(rows).propose(
        [taps] * rows, [tokens] * rows, DEPTHS, temperature=temperature, generator=generator
    )
    probs, drawn = proposal.probs_BLV, proposal.tokens_BL
    assert probs is not None
    assert probs.shape == (rows, DEPTHS, 300)
    torch.testing.assert_close(probs.sum(-1), torch.ones(rows, DEPTHS))
    outside = [v for v in range(300) if v not in ids]
    assert float(probs[..., outside].abs().max()) == 0.0
    for depth in range(DEPTHS):
        observed = torch.bincount(drawn[:, depth], minlength=300) / rows
        assert (observed - probs[0, depth]).abs().max() < 4 * (0.25 / rows) ** 0.5
    # Tokens are drawn each for itself: those of two depths come together as often as their chances' product.
    pairs = torch.bincount(drawn[:, 0] * 300 + drawn[:, 1], minlength=90_000).view(300, 300) / rows
    expected = probs[0, 0][:, None] * probs[0, 1][None]
    assert (pairs - expected).abs().max() < 5 * (0.25 / rows) ** 0.5
    # At a temperature, the probabilities are those of the logits divided by it.
    cold = drafter.open(1).propose([taps], [tokens], DEPTHS, temperature=1.0, generator=generator).probs_BLV
    assert cold is not None
    ratio = probs[0][:, ids].log() * temperature - cold[0][:, ids].log()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)


def test_news_may_come_in_pieces_and_without_drafts(make_world: Worlds) -> None:
    """Keys beyond the first reservation, masks' keys that are overwritten, and rounds that draft nothing."""
    world = make_world(depths=DEPTHS, num_layers=2)
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    feature = world.features(world.tokens(700, 1), 1)
    taps, tokens = feature.taps_TNH[:-1], feature.input_ids_T[1:]
    bit_by_bit, at_once = drafter.open(1), drafter.open(1)
    for turn, start in enumerate(range(0, 600, 60)):
        length = DEPTHS if turn % 2 else 0
        drafted = bit_by_bit.propose([taps[start : start + 60]], [tokens[start : start + 60]], length)
        assert drafted.tokens_BL.shape == (1, length)
    late = bit_by_bit.propose([taps[600:]], [tokens[600:]], DEPTHS)
    assert torch.equal(late.tokens_BL, at_once.propose([taps], [tokens], DEPTHS).tokens_BL)


def test_a_full_row_beside_one_with_more_news(make_world: Worlds) -> None:
    """The fullest row confirms one position, another six: all are written as wide, beyond the first reservation."""
    world = make_world(depths=DEPTHS, num_layers=2)
    drafter = world.algorithm.drafter(world.draft, world.head, world.device)
    rows = [world.features(world.tokens(254, 1), 1), world.features(world.tokens(107, 2), 2)]
    session = drafter.open(2)
    for part in ([slice(0, 252), slice(0, 100)], [slice(252, 253), slice(100, 106)]):
        taps = [row.taps_TNH[where] for row, where in zip(rows, part, strict=True)]
        tokens = [row.input_ids_T[1:][where] for row, where in zip(rows, part, strict=True)]
        late = session.propose(taps, tokens, DEPTHS)
    for row, drafted_L in zip(rows, late.tokens_BL, strict=True):
        alone = drafter.open(1).propose([row.taps_TNH[:-1]], [row.input_ids_T[1:]], DEPTHS)
        assert torch.equal(alone.tokens_BL[0], drafted_L)
