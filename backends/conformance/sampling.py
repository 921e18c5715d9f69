"""Checks of sampled text: drawn from the target's distribution, and again the same with the same seed.

Shape letters: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import torch

from torchspec.backends.conformance.capture import START
from torchspec.backends.conformance.subject import Subject
from torchspec.core.conformance.checks import Check

NEW = 24
SEEDS = (11, 12, 13, 14)
TEMPERATURES = (1.0, 0.3)

# Log-probabilities below this count as this: without a floor, one rare token could outweigh all others.
FLOOR = -9.0
DEVIATIONS = 5.0


def seeds(subject: Subject) -> str:
    engine, prompts = subject.engine(), subject.prompts(NEW)
    first, same, other = (
        engine.generate(prompts, max_new_tokens=NEW, temperature=1.0, seed=seed) for seed in (3, 3, 4)
    )
    assert first == same, "the same seed gives another text"
    assert first != other, "another seed gives the same text"
    for text in first:
        subject.check_end(text, NEW)
    return "texts repeat with their seed alone"


def drawn(subject: Subject) -> str:
    """The tokens' mean log-probability is what the target's own distribution leads one to expect."""
    return "; ".join(_drawn(subject, temperature) for temperature in TEMPERATURES)


def _drawn(subject: Subject, temperature: float) -> str:
    """The sum of log p(token) - E[log p] over all tokens has mean 0, and the sum of their variances for variance,
    since each token is drawn given those before it. What rounding may add is its part of a deviation per token."""
    engine, prompts = subject.engine(), subject.prompts(NEW)
    off = variance = rounding = 0.0
    count = 0
    for seed in SEEDS:
        texts = engine.generate(prompts, max_new_tokens=NEW, temperature=temperature, seed=seed)
        for prompt, text in zip(prompts, texts, strict=True):
            subject.check_end(text, NEW)
            logits_TV = subject.oracle.of([*prompt, *text]).logits_TV[len(prompt) - 1 : -1].double() / temperature
            log_TV = logits_TV.log_softmax(-1)
            p_TV, told_TV = log_TV.exp(), log_TV.clamp(min=FLOOR)
            expected_T = (p_TV * told_TV).sum(-1)
            variance_T = (p_TV * (told_TV - expected_T[:, None]) ** 2).sum(-1)
            told_T = told_TV.gather(1, torch.tensor(text)[:, None])[:, 0]
            off += float((told_T - expected_T).sum())
            variance += float(variance_T.sum())
            rounding += subject.tolerance * float((logits_TV.std(-1) * variance_T.sqrt()).sum())
            count += len(text)
    allowed = DEVIATIONS * variance**0.5 + rounding - FLOOR
    assert abs(off) <= allowed, (
        f"at temperature {temperature:g} the log-probability of {count} sampled tokens is off by {off / count:+.2f} "
        f"each from what the target's distribution leads one to expect; {allowed / count:.2f} is chance"
    )
    return f"temperature {temperature:g}: {count} tokens, {off / count:+.2f} each of {allowed / count:.2f}"


SAMPLING = (
    Check("text: seeds", seeds, START),
    Check("text: sampled from the target", drawn, START),
)
