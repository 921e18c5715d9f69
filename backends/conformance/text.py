"""Checks of `generate` and of decode sessions."""

from __future__ import annotations

import torch

from torchspec.backends.conformance.capture import START
from torchspec.backends.conformance.subject import Subject
from torchspec.core.conformance.checks import Check

NEW = 10


def _prompts(subject: Subject) -> list[list[int]]:
    most = subject.target.max_position_embeddings - NEW
    return [subject.tokens(min(length, most), length) for length in (1, 7, 40, 130)]


def greedy(subject: Subject) -> str:
    """Each token is the target's first choice, or as good as it within rounding; texts end as they should."""
    prompts = _prompts(subject)
    texts = subject.engine().generate(prompts, max_new_tokens=NEW)
    assert len(texts) == len(prompts), f"{len(texts)} texts for {len(prompts)} prompts"
    worst = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        _check_end(subject, text)
        logits_TV = subject.oracle.of([*prompt, *text]).logits_TV[len(prompt) - 1 : -1].double()
        chosen_T = logits_TV.gather(1, torch.tensor(text)[:, None])[:, 0]
        behind = float(((logits_TV.amax(-1) - chosen_T) / logits_TV.std(-1)).max())
        assert behind <= 20 * subject.tolerance, (
            f"a greedy token is {behind:.2g} standard deviations of the logits behind the target's first choice"
        )
        worst = max(worst, behind)
    return f"{sum(map(len, texts))} tokens, at most {worst:.1e} deviations behind the first choice"


def _check_end(subject: Subject, text: list[int]) -> None:
    assert 1 <= len(text) <= NEW, f"a text of {len(text)} tokens, at most {NEW} were asked for"
    ends = set(subject.target.eos_token_ids)
    assert not ends & set(text[:-1]), "a text goes on after the end of the turn"
    assert len(text) == NEW or text[-1] in ends, "a text ends before its end-of-turn token and before its limit"


def neighbours(subject: Subject) -> str:
    engine, prompts = subject.engine(), _prompts(subject)
    for temperature in (0.0, 1.0):
        told = {"max_new_tokens": NEW, "temperature": temperature, "seed": 3}
        together = engine.generate(prompts, **told)  # type: ignore[arg-type]
        alone = [engine.generate([prompt], **told)[0] for prompt in prompts]  # type: ignore[arg-type]
        assert alone == together, f"at temperature {temperature:g} a text depends on the other prompts of its batch"
    return f"{len(prompts)} prompts alone and together, greedy and sampled"


def seeds(subject: Subject) -> str:
    engine, prompts = subject.engine(), _prompts(subject)
    first, same, other = (
        engine.generate(prompts, max_new_tokens=NEW, temperature=1.0, seed=seed) for seed in (3, 3, 4)
    )
    assert first == same, "the same seed gives another text"
    assert first != other, "another seed gives the same text"
    for text in first:
        _check_end(subject, text)
    return "texts repeat with their seed alone"


def stepping(subject: Subject) -> str:
    """Prefill, steps of several tokens, rollbacks and dropped rows against the whole sequence computed at once."""
    if "decode" not in subject.spec.capabilities:
        return "declared absent: no capability 'decode'"
    prompts = [subject.tokens(length, length) for length in (5, 23, 12)]
    session = subject.engine().open(prompts, subject.taps)
    errors = []
    for row, prompt in enumerate(prompts):
        exact = subject.oracle.of(prompt)
        errors.append(subject.error("prefill logits", session.prefill.logits_BV[row].float(), exact.logits_TV[-1]))
        errors.append(subject.error("prefill taps", session.prefill.taps[row].float(), exact.taps_TNH))
    sequences = [list(prompt) for prompt in prompts]

    def step(count: int, seed: int) -> None:
        new = [subject.tokens(count, seed + row) for row in range(len(sequences))]
        output = session.step(torch.tensor(new, device=subject.where))
        for row, tokens in enumerate(new):
            sequences[row] += tokens
            exact = subject.oracle.of(sequences[row])
            errors.append(subject.error("step logits", output.logits_BnV[row].float(), exact.logits_TV[-count:]))
            errors.append(subject.error("step taps", output.taps_BnNH[row].float(), exact.taps_TNH[-count:]))

    def rollback(counts: list[int]) -> None:
        session.rollback(torch.tensor(counts, device=subject.where))
        for row, count in enumerate(counts):
            del sequences[row][len(sequences[row]) - count :]

    step(4, 100)
    rollback([0, 4, 2])
    step(1, 200)
    step(3, 300)
    rollback([3, 0, 1])
    session.keep([2, 0])
    sequences = [sequences[2], sequences[0]]
    step(2, 400)
    return f"{len(errors)} comparisons, off by at most {max(errors):.1e} of {subject.tolerance:.0e}"


TEXT = (
    Check("text: greedy", greedy, START),
    Check("text: alone and beside others", neighbours, START),
    Check("text: seeds", seeds, START),
    Check("decode: steps and rollbacks", stepping, START),
)
