"""Speculation at temperature 0 is greedy decoding, for any draft, any batch and any way of ending."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchspec.core.decoding.generation import DecodeSettings
from torchspec.core.decoding.plain import decode_plain
from torchspec.core.decoding.prompt_lookup import PromptLookupDrafter
from torchspec.core.decoding.speculative import decode
from torchspec.core.errors import DataError
from torchspec.core.interfaces.algorithm import Proposal

Make = Callable[..., Any]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    right=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    draft_length=st.integers(1, 7),
    max_new_tokens=st.integers(1, 40),
    prompts=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=5),
    eos=st.sampled_from([(), (3,), (3, 5)]),
    context=st.sampled_from([10_000, 10, 25]),
    ragged=st.booleans(),
)
def test_greedy_is_lossless(
    make_target: Make,
    make_drafter: Make,
    seed: int,
    right: float,
    draft_length: int,
    max_new_tokens: int,
    prompts: list[list[int]],
    eos: tuple[int, ...],
    context: int,
    ragged: bool,
) -> None:
    target = make_target(seed, eos=eos, context=context)
    wanted = target.generate(prompts, max_new_tokens=max_new_tokens)
    request = DecodeSettings(max_new_tokens=max_new_tokens, draft_length=draft_length)

    plain = decode_plain(target, prompts, request).generations
    batched = decode(target, make_drafter(target, right=right, ragged=ragged), prompts, request).generations
    single = [decode(target, make_drafter(target, right=right), [p], request).generations[0] for p in prompts]

    assert [list(g.tokens) for g in plain] == wanted
    assert [list(g.tokens) for g in batched] == wanted
    assert [list(g.tokens) for g in single] == wanted
    assert [g.finish for g in plain] == [g.finish for g in batched] == [g.finish for g in single]
    for generation in (*batched, *single):
        slot = generation.prompt_tokens - 1
        for round_ in generation.rounds:
            assert round_.slot == slot
            assert 0 <= round_.accepted <= round_.proposed <= draft_length
            assert 1 <= round_.emitted <= round_.accepted + 1
            slot += round_.accepted + 1
        assert all(r.emitted == r.accepted + 1 for r in generation.rounds[:-1])
        assert len(generation.tokens) == 1 + sum(r.emitted for r in generation.rounds)


def test_a_perfect_draft_is_accepted_whole_and_a_wrong_one_never(make_target: Make, make_drafter: Make) -> None:
    target = make_target(1)
    request = DecodeSettings(max_new_tokens=31, draft_length=4)
    perfect = decode(target, make_drafter(target, right=1.0), [[1, 2]], request).generations[0]
    assert [r.accepted for r in perfect.rounds] == [4] * 6
    wrong = decode(target, make_drafter(target, right=0.0), [[1, 2]], request).generations[0]
    assert [r.accepted for r in wrong.rounds] == [0] * 30


def test_finish_reasons(make_target: Make, make_drafter: Make) -> None:
    target = make_target(4, context=20)
    tokens = target.generate([[1, 2, 3]], max_new_tokens=6)[0]
    drafter = make_drafter(target, right=0.9)
    first = tokens.index(tokens[3])
    assert decode(target, drafter, [[1, 2, 3]], DecodeSettings(max_new_tokens=6)).generations[0].finish == "length"
    assert decode(target, drafter, [[1, 2, 3]], DecodeSettings(max_new_tokens=60)).generations[0].finish == "context"
    target.eos = (tokens[3],)
    ended = decode(target, drafter, [[1, 2, 3]], DecodeSettings(max_new_tokens=6)).generations[0]
    assert (ended.finish, list(ended.tokens)) == ("eos", tokens[: first + 1])


@pytest.mark.parametrize(("prompt", "words"), [([], "has 0 tokens"), ([1] * 20, "its context holds 20")])
def test_a_prompt_without_room_is_refused(make_target: Make, prompt: list[int], words: str) -> None:
    target = make_target(4, context=20)
    with pytest.raises(DataError, match=words):
        decode_plain(target, [[1, 2], prompt], DecodeSettings())


@pytest.mark.parametrize("field", [{"max_new_tokens": 0}, {"draft_length": 0}, {"temperature": -1.0}])
def test_settings_are_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        DecodeSettings(**field)


def test_a_drafter_that_proposes_too_much_is_named(make_target: Make) -> None:
    class Eager(PromptLookupDrafter):
        def open(self, batch_size: int) -> Any:
            session = super().open(batch_size)
            session.propose = lambda taps, tokens, length, **_: Proposal(tokens_BL=torch.zeros(1, length + 1).long())
            return session

    with pytest.raises(ValueError, match=r"shape \(1, 6\); expected \[1, at most 5\]"):
        decode(make_target(0), Eager(), [[1]], DecodeSettings())
