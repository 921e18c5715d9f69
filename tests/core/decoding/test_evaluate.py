"""Evaluation counts what decoding did, compares like with like, and says when texts differ and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.decoding.evaluate import EvalSettings, Variant, best_length, compare, evaluate, sweep
from torchspec.core.decoding.generation import Round
from torchspec.core.decoding.measure import with_room
from torchspec.core.decoding.prompt_lookup import PromptLookupDrafter
from torchspec.core.decoding.result import count_acceptance
from torchspec.core.errors import DataError
from torchspec.core.interfaces.engine import Images

Make = Callable[..., Any]


@dataclass(frozen=True)
class Prompt:
    sample_id: str
    input_ids: Sequence[int] | Tensor
    images: Images = ()


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{at}", [1 + at % 12, (at * 5) % 13, at % 3][: 1 + at % 3]) for at in range(count)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_acceptance_is_what_the_rounds_hold(make_target: Make, make_drafter: Make, batch_size: int) -> None:
    target = make_target(3, eos=(4,))
    request = EvalSettings(max_new_tokens=25, draft_length=4, batch_size=batch_size)
    result = evaluate(target, make_drafter(target, right=0.7), make_prompts(9), request)

    rounds = [count for record in result.records for count in record.accepted]
    assert result.rounds == len(rounds) > 20
    assert len(result.acceptance_per_position) == 4
    for position, rate in enumerate(result.acceptance_per_position):
        assert rate == sum(count > position for count in rounds) / len(rounds)
    assert result.acceptance_length == pytest.approx(1 + sum(result.acceptance_per_position), abs=1e-12)
    assert result.acceptance_length == pytest.approx(1 + sum(rounds) / len(rounds), abs=1e-12)
    assert result.accepted == sum(rounds)
    assert result.proposed == 4 * len(rounds)
    assert result.tokens == sum(len(record.tokens) for record in result.records)
    assert result.tokens_per_round == (result.tokens - 9) / len(rounds)
    assert 1 <= result.tokens_per_round <= result.acceptance_length
    assert result.lossless is True
    assert (result.tie_mismatches, result.other_mismatches, result.mismatches) == (0, 0, ())
    assert sorted(record.sample_id for record in result.records) == sorted(p.sample_id for p in make_prompts(9))
    by_name = {p.sample_id: p.input_ids for p in make_prompts(9)}
    for record in result.records:
        assert list(record.prompt) == by_name[record.sample_id]
        assert list(record.tokens) == target.generate([record.prompt], max_new_tokens=25)[0]


def test_batches_draft_alike(make_target: Make) -> None:
    """A deterministic drafter's rounds don't depend on the batch it is in."""
    target = make_target(5, vocab=4, states=31)
    alone, together = (
        evaluate(target, PromptLookupDrafter(), make_prompts(7), EvalSettings(max_new_tokens=40, batch_size=size))
        for size in (1, 5)
    )
    assert {r.sample_id: r for r in alone.records} == {r.sample_id: r for r in together.records}
    assert alone.acceptance_per_position == together.acceptance_per_position


def test_counting_by_hand() -> None:
    entries = [(5, 5, 6), (5, 2, 3), (5, 0, 1), (0, 0, 1), (5, 3, 2)]
    counted = count_acceptance([Round(slot=0, proposed=p, accepted=a, emitted=e) for p, a, e in entries], 5)
    assert counted.per_position == (0.6, 0.6, 0.4, 0.2, 0.2)
    assert counted.length == 3.0
    assert (counted.rounds, counted.proposed, counted.accepted) == (5, 20, 10)
    none = count_acceptance([], 2)
    assert (none.rounds, none.per_position, none.length) == (0, (0.0, 0.0), 1.0)


def test_a_generous_limit_changes_no_rate(make_target: Make, make_drafter: Make) -> None:
    """The round in which the limit falls counts as verification left it: a perfect draft stays perfect."""
    target = make_target(3)
    for limit in (7, 8, 9, 10):
        request = EvalSettings(max_new_tokens=limit, draft_length=5)
        result = evaluate(target, make_drafter(target, right=1.0), make_prompts(2), request)
        assert result.acceptance_per_position == (1.0,) * 5
        assert result.tokens == 2 * limit


@pytest.mark.parametrize(("asked", "drafted"), [(2, 2), (3, 3), (6, 3)])
def test_a_draft_that_has_no_more_to_give_is_told(
    make_target: Make, make_drafter: Make, asked: int, drafted: int
) -> None:
    """As a block has not."""

    class Block(make_drafter):  # type: ignore[misc]
        def open(self, batch_size: int) -> Any:
            session = super().open(batch_size)
            propose = session.propose
            session.propose = lambda taps, tokens, length, **given: propose(taps, tokens, min(3, length), **given)
            return session

    target = make_target(3)
    request = EvalSettings(max_new_tokens=12, draft_length=asked)
    result = evaluate(target, Block(target, right=0.7), make_prompts(3), request)
    assert result.longest_draft == drafted
    assert len(result.acceptance_per_position) == asked


def test_json_holds_the_agreed_names(make_target: Make, make_drafter: Make) -> None:
    target = make_target(3)
    result = evaluate(target, make_drafter(target), make_prompts(2), EvalSettings(max_new_tokens=6))
    values = json.loads(json.dumps(result.to_json()))
    wanted = ("acceptance_length", "acceptance_per_position", "tokens_per_second", "tokens_per_second_draftless")
    assert {*wanted, "speedup", "lossless", "rounds", "tokens", "prompts", "temperature", "draft_length", "dtype",
            "machine", "seconds", "tie_mismatches", "other_mismatches"} <= values.keys()  # fmt: skip
    assert values["lossless"] is True
    assert values["dtype"] == "float32"
    assert set(values["seconds"]) == {"prefill", "draft", "target", "total", "cpu"}
    assert values["speedup"] == pytest.approx(values["tokens_per_second"] / values["tokens_per_second_draftless"])
    assert values["tokens_per_second"] == pytest.approx(values["tokens"] / values["seconds"]["total"])
    assert "records" not in values
    records = json.loads(json.dumps(result.to_json(records=True)))["records"]
    assert records[0]["tokens"] == list(result.records[0].tokens)


def test_without_a_baseline_nothing_is_claimed(make_target: Make, make_drafter: Make) -> None:
    target = make_target(3)
    request = EvalSettings(max_new_tokens=6, compare_draftless=False)
    result = evaluate(target, make_drafter(target), make_prompts(2), request)
    assert result.speedup is result.speedup_median is result.tokens_per_second_draftless is None
    assert result.decoding_speedup is result.cpu_speedup is None
    assert result.lossless is result.tie_mismatches is result.other_mismatches is result.seconds_draftless is None


def test_sampling_is_seeded_and_not_compared_token_for_token(make_target: Make, make_drafter: Make) -> None:
    target = make_target(3)
    request = EvalSettings(max_new_tokens=12, temperature=1.0)
    first, again, other = (
        evaluate(target, make_drafter(target), make_prompts(4), replace(request, seed=seed)) for seed in (0, 0, 1)
    )
    assert first.records == again.records != other.records
    assert first.lossless is first.tie_mismatches is None
    assert first.speedup is not None


def noisy(target: Any, shift: float) -> Any:
    """The target's steps over several tokens lift the second best token by `shift`, as rounding does."""
    open_session = target.open

    def open_(prompts: Any, taps: Any) -> Any:
        session = open_session(prompts, taps)
        step = session.step

        def shifted(tokens_Bn: Tensor) -> Any:
            output = step(tokens_Bn)
            if tokens_Bn.shape[1] > 1:
                second = output.logits_BnV.topk(2).indices[..., 1:]
                output.logits_BnV.scatter_add_(-1, second, torch.full(second.shape, shift))
            return output

        session.step = shifted
        return session

    target.open = open_
    return target


@pytest.mark.parametrize(("shift", "tie"), [(1e-6, True), (0.05, False)])
def test_mismatches_are_told_from_ties(make_target: Make, make_drafter: Make, shift: float, tie: bool) -> None:
    target = make_target(3)
    best = target.logits_MV.topk(2)
    gap = 3e-7 if tie else 0.03
    target.logits_MV.scatter_(1, best.indices[:, 1:], best.values[:, :1] - gap)
    result = evaluate(noisy(target, shift), make_drafter(target), make_prompts(5), EvalSettings(max_new_tokens=9))
    assert result.lossless is False
    assert (result.tie_mismatches, result.other_mismatches) == ((5, 0) if tie else (0, 5))
    for record, mismatch in zip(result.records, result.mismatches, strict=True):
        plain = target.generate([record.prompt], max_new_tokens=9)[0]
        assert plain[: mismatch.position] == list(record.tokens[: mismatch.position])
        assert (plain[mismatch.position], record.tokens[mismatch.position]) == (
            mismatch.token_draftless,
            mismatch.token,
        )
        assert mismatch.gap == pytest.approx(gap, rel=0.5)


def test_every_way_runs_on_a_batch_before_the_next_and_the_order_rotates(make_target: Make, make_drafter: Make) -> None:
    target = make_target(3)
    opened: list[tuple[tuple[int, ...], int]] = []
    open_session = target.open

    def open_(prompts: Any, taps: Any) -> Any:
        opened.append((tuple(taps), prompts[0][0]))
        return open_session(prompts, taps)

    target.open = open_
    prompts = [Prompt(str(at), [at]) for at in range(4)]
    calls: list[tuple[str, int, int]] = []
    evaluate(
        target,
        make_drafter(target),
        prompts,
        EvalSettings(max_new_tokens=3, warmup=1),
        progress=lambda *call: calls.append(call),
    )
    draft, plain = (0,), ()
    warm, timed = opened[:2], opened[2:]
    assert warm == [(draft, 0), (plain, 0)]
    assert timed == [(draft, 0), (plain, 0), (plain, 1), (draft, 1), (draft, 2), (plain, 2), (plain, 3), (draft, 3)]
    assert calls == [("evaluate", done, 4) for done in (1, 2, 3, 4)]


def test_prompts_that_fill_the_context_are_left_out_and_counted(make_target: Make, make_drafter: Make) -> None:
    target = make_target(3, context=6)
    prompts = [Prompt("long", [1] * 6), Prompt("fits", torch.tensor([1] * 5)), Prompt("empty", [])]
    result = evaluate(target, make_drafter(target), prompts, EvalSettings())
    assert (result.prompts, result.skipped, result.tokens) == (1, 2, 1)
    assert result.rounds == 0
    with pytest.raises(DataError, match="each of the 1 is empty or fills the target's context of 6 tokens"):
        evaluate(target, make_drafter(target), prompts[:1], EvalSettings())
    with pytest.raises(DataError, match="no prompt to decode"):
        evaluate(target, make_drafter(target), [], EvalSettings())


def test_sweep_and_comparison_share_prompts_and_baseline(make_target: Make, make_drafter: Make) -> None:
    target = make_target(3)
    drafter = make_drafter(target, right=1.0)
    results = sweep(target, drafter, make_prompts(3), EvalSettings(max_new_tokens=9), [1, 2, 6])
    assert {length: r.acceptance_length for length, r in results.items()} == {1: 2.0, 2: 3.0, 6: 7.0}
    assert len({r.tokens_per_second_draftless for r in results.values()}) == 1
    speeds = {1: 1.1, 2: 1.9, 6: 1.4}
    assert best_length({at: replace(result, speedup_median=speeds[at]) for at, result in results.items()}) == 2

    drafts = {"trained": Variant(drafter=drafter, draft_length=3), "lookup": Variant(drafter=PromptLookupDrafter())}
    both = compare(target, drafts, make_prompts(3), EvalSettings(max_new_tokens=9))
    assert both["trained"].acceptance_length == 4.0
    assert both["lookup"].draft_length == 1
    assert all(r.lossless for r in both.values())


@pytest.mark.parametrize("field", [{"batch_size": 0}, {"warmup": -1}, {"temperature": -0.1}, {"draft_length": 0}])
def test_settings_are_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        EvalSettings(**field)


def test_prompts_that_fill_the_context_are_left_out_together() -> None:
    short, long, empty = (Prompt(str(size), tuple(range(size))) for size in (3, 6, 0))
    assert with_room(6, [long, short, empty]) == [short]
    with pytest.raises(DataError, match="each of the 2"):
        with_room(6, [long, empty])


def test_the_largest_seed_of_a_configuration_samples(make_target: Make, make_drafter: Make) -> None:
    target = make_target(3)
    request = EvalSettings(max_new_tokens=4, draft_length=2, temperature=1.0, seed=2**63 - 1, compare_draftless=False)
    assert evaluate(target, make_drafter(target), make_prompts(2), request).tokens == 8
