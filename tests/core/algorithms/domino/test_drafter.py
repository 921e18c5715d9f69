"""Drafting with Domino: what it drafts is what the training forward says, and the text stays the target's.

On the embedded target the texts are real greedy decoding; elsewhere the target's features are made up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from torchspec.core.interfaces.features import Features


@pytest.fixture(scope="module")
def decoding(block_decoding: Any) -> Any:
    return block_decoding.Decoding("domino", {"block_size": block_decoding.K + 1, "emb_dim": 32, "gru_hidden_dim": 96})


def test_every_round_accepts_what_the_training_forward_says(decoding: Any) -> None:
    decoding.check_rounds()


def test_sampled_tokens_follow_the_probabilities_that_are_returned(
    make_world: Callable[..., Any], block_decoding: Any
) -> None:
    """Each step's depend on the tokens drawn before it, and are those of the logits over the temperature."""
    world = make_world(block_size=4)
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
    world = make_world(block_size=5)
    features = [world.features(world.tokens(n, n), n) for n in (5, 12, 3)]

    def proposed(chosen: Sequence[Features]) -> Any:
        session = world.algorithm.drafter(world.draft, world.head, world.device).open(len(chosen))
        return session.propose([f.taps_TNH[:-1] for f in chosen], [f.input_ids_T[1:] for f in chosen], 4)

    together = proposed(features)
    for place, feature in enumerate(features):
        alone = proposed([feature])
        assert torch.equal(alone.tokens_BL[0], together.tokens_BL[place])
