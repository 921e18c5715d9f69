"""A draft measured where it will serve: in a real engine, beside the same engine without it and our own decoder.

The field's most common failure is a draft that validates well and is hardly accepted when served, since the engine taps
other layers, norms or rotates otherwise, or reads the vocabulary map another way. So the engine's own counts are the
figure, and our decoder's are what they must be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchspec.core.decoding.generation import Generation
from torchspec.core.decoding.lossless import Mismatch
from torchspec.core.decoding.measure import PromptLike
from torchspec.core.decoding.result import Acceptance, count_acceptance
from torchspec.core.errors import DataError, TorchspecError
from torchspec.core.interfaces.engine import ServedText, ServingCounters, ServingEngine

Progress = Callable[[str, int, int], None]

TOLERANCE = 0.05
"""Of the acceptance length, relative: bfloat16 engines tip some near-ties otherwise."""


LEAST_ALIKE = 0.5
"""Share of texts in whose rounds a float32 engine must accept exactly what our decoder accepts (greedily)."""


class ServingMismatchError(TorchspecError):
    """The engine accepts other tokens than our decoder does: the draft is not served as it was trained."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """`batch_size` prompts are in the engine at a time."""

    max_new_tokens: int = 128
    draft_length: int = 5
    temperature: float = 0.0
    batch_size: int = 1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ServedRun:
    """What an engine made of the prompts. `counters` are its own, of these prompts alone."""

    engine: str
    version: str
    texts: tuple[ServedText, ...]
    counters: ServingCounters
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(text.tokens) for text in self.texts)


def with_space(context: int, prompts: Sequence[PromptLike], settings: ServeSettings) -> list[PromptLike]:
    """Prompts after which everything asked for fits the target's context, so that no engine's end of context matters.

    DataError if there is none.
    """
    need = settings.max_new_tokens + settings.draft_length + 1
    kept = [prompt for prompt in prompts if 0 < len(prompt.input_ids) <= context - need]
    if not kept:
        raise DataError(
            f"none of the {len(prompts)} prompts leaves room for {settings.max_new_tokens} new tokens and a draft of "
            f"{settings.draft_length} in the target's context of {context}: lower max_new_tokens, or give shorter ones"
        )
    return kept


def serve_prompts(
    engine: ServingEngine,
    prompts: Sequence[PromptLike],
    settings: ServeSettings,
    *,
    stage: str = "serve",
    progress: Progress | None = None,
) -> ServedRun:
    """Decode the prompts in the engine, after one of them to warm up."""
    ids = [[int(token) for token in prompt.input_ids] for prompt in prompts]
    ask: dict[str, Any] = {"temperature": settings.temperature, "seed": settings.seed}
    engine.decode(ids[:1], max_new_tokens=min(16, settings.max_new_tokens), **ask)
    before = engine.counters()
    texts: list[ServedText] = []
    start = time.perf_counter()
    for first in range(0, len(ids), settings.batch_size):
        batch = ids[first : first + settings.batch_size]
        texts += engine.decode(batch, max_new_tokens=settings.max_new_tokens, **ask)
        if progress is not None:
            progress(stage, len(texts), len(ids))
    seconds = time.perf_counter() - start
    return ServedRun(
        engine=engine.name,
        version=engine.version,
        texts=tuple(texts),
        counters=_since(before, engine.counters(), texts),
        seconds=seconds,
    )


def _since(before: ServingCounters, after: ServingCounters, texts: Sequence[ServedText]) -> ServingCounters:
    """The difference. An engine that died in between has counted anew: then what the texts say, where they say it."""
    accepted = [count for text in texts for count in text.accepted or ()]
    silent = any(text.accepted is None for text in texts)
    if silent and after.rounds < before.rounds:
        raise TorchspecError("the engine died while it was measured, and its counters began anew: measure again")
    if not silent and len(accepted) != after.rounds - before.rounds:
        longest = max(accepted, default=0)
        reached = tuple(sum(count > place for count in accepted) for place in range(longest))
        return ServingCounters(rounds=len(accepted), drafted=0, accepted=sum(accepted), per_position=reached)
    positions = None
    if after.per_position is not None:
        earlier = before.per_position or (0,) * len(after.per_position)
        positions = tuple(late - early for late, early in zip(after.per_position, earlier, strict=True))
    return ServingCounters(
        rounds=after.rounds - before.rounds,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
        per_position=positions,
    )


@dataclass(frozen=True, kw_only=True)
class ServedResult:
    """Measured in a serving engine, by its own counters.

    acceptance_length        accepted tokens per drafting round + 1
    acceptance_per_position  unconditional: the share of rounds that accepted more than j tokens; None where the
                             engine counts them neither in all nor per text
    lossless                 every text is the engine's own without the draft; None at temperature > 0, and where that
                             was not run
    own_acceptance_length    our decoder's, on the same prompts; None if it was not run. `difference` is relative to it
    same_rounds              prompts whose accepted tokens per round are our decoder's, round by round, of
                             `compared_rounds`; None where the engine keeps silent on them
    """

    engine: str
    engine_version: str
    acceptance_length: float
    acceptance_per_position: tuple[float, ...] | None
    rounds: int
    drafted: int
    accepted: int
    tokens: int
    tokens_per_second: float
    tokens_per_second_draftless: float | None
    speedup: float | None
    lossless: bool | None
    mismatches: tuple[Mismatch, ...]
    own_acceptance_length: float | None
    difference: float | None
    same_rounds: int | None
    compared_rounds: int | None
    prompts: int
    skipped: int
    draft_length: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "drafting": "chain", "averaging": "over drafting rounds of all prompts"}


def served_acceptance(run: ServedRun, draft_length: int) -> Acceptance:
    """From the engine's counters; per position from its texts where it does not count them."""
    counters = run.counters
    positions = counters.per_position
    if positions is None and all(text.accepted is not None for text in run.texts):
        each = [count for text in run.texts for count in text.accepted or ()]
        positions = tuple(sum(count > place for count in each) for place in range(draft_length))
    rounds = counters.rounds
    return Acceptance(
        rounds=rounds,
        proposed=counters.drafted,
        accepted=counters.accepted,
        per_position=tuple(count / rounds if rounds else 0.0 for count in positions or ()),
        length=1.0 + (counters.accepted / rounds if rounds else 0.0),
    )


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """Our decoder's generations of the same prompts, in order."""

    generations: Sequence[Generation]

    def acceptance(self, draft_length: int) -> Acceptance:
        return count_acceptance((r for g in self.generations for r in g.rounds), draft_length)

    def same_rounds(self, run: ServedRun) -> tuple[int, int] | None:
        """(equal, compared) prompts."""
        pairs = [
            (tuple(r.accepted for r in generation.rounds), text.accepted)
            for generation, text in zip(self.generations, run.texts, strict=True)
        ]
        told = [(ours, theirs) for ours, theirs in pairs if theirs is not None]
        return (sum(ours == theirs for ours, theirs in told), len(told)) if told else None


def check_agreement(result: ServedResult, tolerance: float = TOLERANCE) -> None:
    """Raise ServingMismatchError when the draft is not served as it was trained, naming what usually is the cause."""
    complaints = []
    wrong = [mismatch for mismatch in result.mismatches if not mismatch.tie]
    if wrong:
        complaints.append(
            f"{len(wrong)} of {result.prompts} texts differ from those of {result.engine} without the draft, first "
            f"{wrong[0].sample_id!r} at new token {wrong[0].position}"
        )
    if result.difference is not None and abs(result.difference) > tolerance:
        complaints.append(
            f"{result.engine} {result.engine_version} accepts {result.acceptance_length:.3f} tokens per round where "
            f"our decoder accepts {result.own_acceptance_length:.3f} (limit: {tolerance:.0%} apart)"
        )
    alike, compared = result.same_rounds, result.compared_rounds
    if alike is not None and compared and result.dtype == "float32" and alike < LEAST_ALIKE * compared:
        complaints.append(
            f"{result.engine} accepts the tokens that our decoder accepts, round by round, in only {alike} of "
            f"{compared} texts, and in float32 there is little that rounding could tip"
        )
    if complaints:
        raise ServingMismatchError("; ".join(complaints) + _CAUSES)


_CAUSES = """
    what usually is the cause, in this order:
      - tap ids: engines number layers differently (docs/concepts.md); config.json must say which are tapped
      - norm flags (norm_before_residual, norm_before_fc, fc_norm, norm_output) that the engine reads another way
      - rotary positions: rope_theta, rope_scaling or rope_parameters of the draft's config.json
      - the vocabulary map d2t, which holds offsets, not ids
      - the mask token, of drafts that have one
      - another target than the draft was trained on, or another precision or quantisation of it
    `torchspec export` writes all of these and checks them: export the draft anew for this engine's format"""
