"""Checks of greedy text, and of what a text may depend on.

Shape letters: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import torch

from torchspec.backends.conformance.capture import START
from torchspec.backends.conformance.decoding import DECODING
from torchspec.backends.conformance.ending import ENDING
from torchspec.backends.conformance.sampling import SAMPLING
from torchspec.backends.conformance.subject import Subject
from torchspec.core.conformance.checks import Check

NEW = 10


def greedy(subject: Subject) -> str:
    """Each token is the target's first choice, or as good as it within rounding; texts end as they should."""
    prompts = subject.prompts(NEW)
    texts = subject.engine().generate(prompts, max_new_tokens=NEW)
    assert len(texts) == len(prompts), f"{len(texts)} texts for {len(prompts)} prompts"
    worst = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        subject.check_end(text, NEW)
        logits_TV = subject.oracle.of([*prompt, *text]).logits_TV[len(prompt) - 1 : -1].double()
        chosen_T = logits_TV.gather(1, torch.tensor(text)[:, None])[:, 0]
        behind = float(((logits_TV.amax(-1) - chosen_T) / logits_TV.std(-1)).max())
        assert behind <= subject.allowance, (
            f"a greedy token is {behind:.2g} standard deviations of the logits behind the target's first choice"
        )
        worst = max(worst, behind)
    return f"{sum(map(len, texts))} tokens, at most {worst:.1e} deviations behind the first choice"


def neighbours(subject: Subject) -> str:
    """A batch of another size may round otherwise. Greedy text may then take the other of two choices that are as good;
    a draw may tip over too often in half precision to be told from a mistake."""
    engine, prompts = subject.engine(), subject.prompts(NEW)
    together = engine.generate(prompts, max_new_tokens=NEW)
    for prompt, beside in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], max_new_tokens=NEW)
        assert _as_good(subject, prompt, alone, beside), "greedy text depends on the other prompts of its batch"
    if subject.dtype != torch.float32:
        return f"{len(prompts)} prompts alone and together, greedy; sampled text is compared in float32 only"
    together = engine.generate(prompts, max_new_tokens=NEW, temperature=1.0, seed=3)
    alone_each = [engine.generate([prompt], max_new_tokens=NEW, temperature=1.0, seed=3)[0] for prompt in prompts]
    assert alone_each == together, "sampled text depends on the other prompts of its batch"
    return f"{len(prompts)} prompts alone and together, greedy and sampled"


def _as_good(subject: Subject, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Whether two texts are the same to where the target finds both tokens as good within rounding."""
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if same is None:
        return len(one) == len(other)
    logits_V = subject.oracle.of([*prompt, *one[:same]]).logits_TV[-1].double()
    behind = (logits_V.max() - torch.stack([logits_V[one[same]], logits_V[other[same]]])) / logits_V.std()
    return float(behind.max()) <= subject.allowance


TEXT = (
    Check("text: greedy", greedy, START),
    *ENDING,
    Check("text: alone and beside others", neighbours, START),
    *SAMPLING,
    *DECODING,
)
