"""Prompt lookup copies what followed the longest, latest match, and says when there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchspec.core.decoding.generation import DecodeSettings
from torchspec.core.decoding.prompt_lookup import PromptLookupDrafter
from torchspec.core.decoding.speculative import decode


def propose(drafter: PromptLookupDrafter, *texts: list[int], length: int = 4) -> tuple[list[list[int]], list[int]]:
    session = drafter.open(len(texts))
    empty = [torch.zeros(len(text), 0, 1) for text in texts]
    proposal = session.propose(empty, [torch.tensor(text) for text in texts], length)
    assert proposal.probs_BLV is None
    assert proposal.lengths_B is not None
    return proposal.tokens_BL.tolist(), proposal.lengths_B.tolist()


def by_definition(text: list[int], longest: int, shortest: int, length: int) -> list[int]:
    for size in range(longest, shortest - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if len(text) > size and text[start : start + size] == text[len(text) - size :]:
                grown = list(text)
                for offset in range(length):
                    grown.append(grown[start + size + offset])
                return grown[len(text) :]
    return []


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=25),
    cut=st.integers(0, 24),
    longest=st.integers(1, 4),
    length=st.integers(1, 6),
)
def test_against_the_definition(text: list[int], cut: int, longest: int, length: int) -> None:
    drafter = PromptLookupDrafter(longest=longest)
    session = drafter.open(1)
    parts = [part for part in (text[: cut % len(text)], text[cut % len(text) :]) if part]
    for part in parts:
        proposal = session.propose([torch.zeros(len(part), 0, 1)], [torch.tensor(part)], length)
    assert proposal.tokens_BL[0].tolist() == by_definition(text, longest, 1, length)


def test_longest_then_latest_and_copies_run_into_themselves() -> None:
    drafter = PromptLookupDrafter()
    assert propose(drafter, [1, 2, 9, 3, 2, 8, 1, 2])[0] == [[9, 3, 2, 8]]  # "1 2" beats the later "2"
    assert propose(drafter, [2, 9, 3, 2, 8, 7, 2])[0] == [[8, 7, 2, 8]]  # the latest "2"; runs past the end
    assert propose(drafter, [5, 5])[0] == [[5, 5, 5, 5]]
    assert propose(PromptLookupDrafter(shortest=2), [2, 9, 2])[0] == [[]]


def test_rows_without_a_match_propose_nothing() -> None:
    tokens, lengths = propose(PromptLookupDrafter(), [1, 2, 3], [1, 2, 1])
    assert lengths == [0, 4]
    assert tokens == [[0, 0, 0, 0], [2, 1, 2, 1]]
    assert propose(PromptLookupDrafter(), [1, 2, 3], [4, 5, 6]) == ([[], []], [0, 0])


def test_rounds_without_a_match_count_and_hold_nothing(make_target: Callable[..., Any]) -> None:
    """Token 0 pads the proposal of a row without a match; the target saying 0 there must not count as accepted."""
    target = make_target(0, vocab=500)
    target.logits_MV[:, 0] += 100.0
    prompts = [[3, 4, 5], [7, 7, 0, 7, 0]]
    none, found = decode(target, PromptLookupDrafter(), prompts, DecodeSettings(max_new_tokens=12)).generations
    assert [(r.proposed, r.accepted, r.emitted) for r in none.rounds] == [(0, 0, 1), (5, 5, 6), (5, 5, 4)]
    assert [(r.proposed, r.accepted, r.emitted) for r in found.rounds] == [(5, 5, 6), (5, 5, 5)]


@pytest.mark.parametrize(("longest", "shortest"), [(1, 2), (3, 0)])
def test_sizes_are_checked(longest: int, shortest: int) -> None:
    with pytest.raises(ValueError, match="n-gram sizes"):
        PromptLookupDrafter(longest=longest, shortest=shortest)
