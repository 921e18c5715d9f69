"""Drafting with DSpark: what it drafts is what the training forward says, and the text stays the target's.

On the embedded target the texts are real greedy decoding; elsewhere the target's features are made up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from torchspec.core.interfaces.features import Features

BLOCK = 4


@pytest.fixture(scope="module", params=["vanilla", "gated", "rnn"])
def decoding(request: pytest.FixtureRequest, block_decoding: Any) -> Any:
    options = {"block_size": BLOCK, "markov_head_type": request.param, "markov_rank": 16}
    return block_decoding.Decoding("dspark", options)


def test_every_round_accepts_what_the_training_forward_says(decoding: Any) -> None:
    decoding.check_rounds()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scheduled_lengths_leave_the_text_the_targets(decoding: Any, temperature: float) -> None:
    whole = decoding.decoded(temperature=temperature)
    for least in (0.05, 0.999):
        scheduled = decoding.decoded(min_confidence=least, temperature=temperature)
        if temperature == 0:
            assert [list(g.tokens) for g in scheduled] == decoding.texts
        proposed = [entry.proposed for g in scheduled for entry in g.rounds]
        assert all(entry.accepted <= entry.proposed for g in scheduled for entry in g.rounds)
        assert sum(proposed) < sum(entry.proposed for g in whole for entry in g.rounds)
        assert min(proposed) < BLOCK


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_lengths_are_the_products_of_the_confidences(
    make_world: Callable[..., Any], block_decoding: Any, kind: str
) -> None:
    world = make_world(markov_head_type=kind, block_size=6, min_confidence=0.2)
    with torch.no_grad():
        world.draft.confidence_head.proj.weight.mul_(0.5)
        world.draft.confidence_head.proj.bias.fill_(0.5)
    features = [world.features(world.tokens(n, n), n) for n in (9, 14, 11, 20, 7, 16)]
    session = world.algorithm.drafter(world.draft, world.head, world.device).open(len(features))
    proposal = session.propose([f.taps_TNH[:-1] for f in features], [f.input_ids_T[1:] for f in features], 6)
    assert proposal.lengths_B is not None
    for feature, drafted, length in zip(
        features, proposal.tokens_BL.tolist(), proposal.lengths_B.tolist(), strict=True
    ):
        product, want = 1.0, 0
        states = block_decoding.states_of(world, feature)
        for state, token in zip(states, [int(feature.input_ids_T[-1]), *drafted[:-1]], strict=True):
            read = torch.cat((state, world.draft.markov_head.markov_w1.weight[token]))
            logit = world.draft.confidence_head.proj.weight[0] @ read + world.draft.confidence_head.proj.bias[0]
            product *= float(logit.detach().sigmoid())
            want += product >= 0.2
        assert length == want
    assert len(set(proposal.lengths_B.tolist())) > 1


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_sampled_tokens_follow_the_probabilities_that_are_returned(
    make_world: Callable[..., Any], block_decoding: Any, kind: str
) -> None:
    """Each step's depend on the tokens drawn before it, and are those of the logits over the temperature."""
    world = make_world(markov_head_type=kind, block_size=3)
    feature, rows, temperature = world.features(world.tokens(9)), 1500, 0.5
    taps, tokens = feature.taps_TNH[:-1], feature.input_ids_T[1:]
    session = world.algorithm.drafter(world.draft, world.head, world.device).open(rows)
    proposal = session.propose(
        [taps] * rows, [tokens] * rows, 3, temperature=temperature, generator=torch.Generator().manual_seed(0)
    )
    drawn, probs = proposal.tokens_BL, proposal.probs_BLV
    assert probs is not None
    observed = torch.bincount(drawn[:, 0], minlength=300) / rows
    assert (observed - probs[0, 0]).abs().max() < 4 * (0.25 / rows) ** 0.5
    states = block_decoding.states_of(world, feature)
    head, correction = world.head.head_VH, world.draft.correction
    for row in range(0, rows, 97):
        before = torch.cat((tokens[-1:], drawn[row, :-1]))
        with torch.no_grad():
            feature_1KX = correction.features(states[None, None], before[None, None], world.head.embedding_VH)[0]
            logits = states @ head.T + feature_1KX[0] @ correction.map_NX.T
        torch.testing.assert_close(probs[row], (logits / temperature).softmax(-1), rtol=1e-9, atol=1e-12)
    assert len(drawn[:, 0].unique()) > 3


def test_batched_drafts_are_those_of_single_rows(make_world: Callable[..., Any]) -> None:
    world = make_world(markov_head_type="rnn", min_confidence=0.05)
    features = [world.features(world.tokens(n, n), n) for n in (5, 12, 3)]

    def proposed(chosen: Sequence[Features]) -> Any:
        session = world.algorithm.drafter(world.draft, world.head, world.device).open(len(chosen))
        return session.propose([f.taps_TNH[:-1] for f in chosen], [f.input_ids_T[1:] for f in chosen], 4)

    together = proposed(features)
    for place, feature in enumerate(features):
        alone = proposed([feature])
        assert torch.equal(alone.tokens_BL[0], together.tokens_BL[place])
        assert torch.equal(alone.lengths_B[0], together.lengths_B[place])
