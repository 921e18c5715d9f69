"""Measuring a draft by real decoding: acceptance, speed beside draftless decoding, and losslessness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from torchspec.core.decoding.lossless import Mismatch, Texts, find_mismatch
from torchspec.core.decoding.measure import (
    Batch,
    EvalSettings,
    Progress,
    PromptLike,
    Run,
    Variant,
    make_batches,
    measure,
)
from torchspec.core.decoding.result import EvalResult, PromptRecord, count_acceptance, machine_facts
from torchspec.core.interfaces.algorithm import Drafter
from torchspec.core.interfaces.engine import Images, TargetEngine

__all__ = ["EvalResult", "EvalSettings", "Variant", "best_length", "compare", "evaluate", "sweep"]


def evaluate(
    engine: TargetEngine,
    drafter: Drafter,
    prompts: Sequence[PromptLike],
    settings: EvalSettings,
    *,
    progress: Progress | None = None,
) -> EvalResult:
    """Decode every prompt with the draft and, if asked, without it.

    Raises DataError when there is no prompt, or none leaves room for a new token.
    """
    variant = Variant(drafter=drafter, draft_length=settings.draft_length)
    return compare(engine, {"draft": variant}, prompts, settings, progress=progress)["draft"]


def sweep(
    engine: TargetEngine,
    drafter: Drafter,
    prompts: Sequence[PromptLike],
    settings: EvalSettings,
    lengths: Sequence[int],
    *,
    progress: Progress | None = None,
) -> dict[int, EvalResult]:
    """`evaluate` for several draft lengths, measured side by side; `settings.draft_length` is not used."""
    variants = {str(length): Variant(drafter=drafter, draft_length=length) for length in lengths}
    results = compare(engine, variants, prompts, settings, progress=progress)
    return {int(name): result for name, result in results.items()}


def best_length(results: Mapping[int, EvalResult]) -> int:
    """The fastest draft length of a sweep: by the median speed-up where it was measured, else by tokens/s."""

    def speed(length: int) -> float:
        result = results[length]
        return result.tokens_per_second if result.speedup_median is None else result.speedup_median

    return max(results, key=speed)


def compare(
    engine: TargetEngine,
    variants: Mapping[str, Variant],
    prompts: Sequence[PromptLike],
    settings: EvalSettings,
    *,
    progress: Progress | None = None,
) -> dict[str, EvalResult]:
    """Several drafts or draft lengths on the same prompts, measured side by side with one draftless baseline."""
    batches = make_batches(engine, prompts, settings.batch_size)
    ways = list(variants.values())
    if settings.compare_draftless:
        ways.append(Variant(drafter=None))
    runs = measure(engine, ways, batches, settings, progress)
    baseline = runs[-1] if settings.compare_draftless else None
    skipped = len(prompts) - sum(len(batch.prompts) for batch in batches)
    return {
        name: _summarise(engine, settings, batches, run, baseline, skipped)
        for name, run in zip(variants, runs, strict=False)
    }


def _summarise(
    engine: TargetEngine,
    settings: EvalSettings,
    batches: Sequence[Batch],
    run: Run,
    baseline: Run | None,
    skipped: int,
) -> EvalResult:
    acceptance = count_acceptance((r for g in run.generations for r in g.rounds), run.way.draft_length)
    emitted = sum(r.emitted for g in run.generations for r in g.rounds)
    names = [name for batch in batches for name in batch.names]
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    images = [each for batch in batches for each in batch.images]
    speeds = _Speeds.of(run, baseline)
    mismatches = _mismatches(engine, names, prompts, images, run, baseline) if settings.temperature == 0.0 else None
    ties = None if mismatches is None else sum(mismatch.tie for mismatch in mismatches)
    return EvalResult(
        acceptance_length=acceptance.length,
        acceptance_per_position=acceptance.per_position,
        tokens_per_second=speeds.tokens_per_second,
        tokens_per_second_draftless=speeds.draftless,
        speedup=speeds.speedup,
        speedup_median=speeds.median,
        decoding_speedup=speeds.decoding,
        cpu_speedup=speeds.cpu,
        lossless=None if mismatches is None else not mismatches,
        tie_mismatches=ties,
        other_mismatches=None if mismatches is None or ties is None else len(mismatches) - ties,
        rounds=acceptance.rounds,
        proposed=acceptance.proposed,
        accepted=acceptance.accepted,
        longest_draft=max((r.proposed for g in run.generations for r in g.rounds), default=0),
        tokens=run.tokens,
        tokens_per_round=emitted / acceptance.rounds if acceptance.rounds else 1.0,
        prompts=len(prompts),
        skipped=skipped,
        draft_length=run.way.draft_length,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
        dtype=str(run.decoded[0].dtype).removeprefix("torch."),
        seconds=run.seconds,
        seconds_draftless=None if baseline is None else baseline.seconds,
        machine=machine_facts(run.decoded[0].device, engine),
        mismatches=tuple(mismatches or ()),
        records=tuple(
            PromptRecord(
                sample_id=name,
                prompt=tuple(prompt),
                tokens=generation.tokens,
                accepted=tuple(r.accepted for r in generation.rounds),
                finish=generation.finish,
            )
            for name, prompt, generation in zip(names, prompts, run.generations, strict=True)
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Speeds:
    tokens_per_second: float
    draftless: float | None
    speedup: float | None
    median: float | None
    decoding: float | None
    cpu: float | None

    @classmethod
    def of(cls, run: Run, baseline: Run | None) -> _Speeds:
        speed = run.tokens / run.seconds.total
        if baseline is None:
            return cls(tokens_per_second=speed, draftless=None, speedup=None, median=None, decoding=None, cpu=None)
        draftless = baseline.tokens / baseline.seconds.total
        pairs = zip(run.decoded, baseline.decoded, strict=True)
        ratios = [(a.tokens / a.seconds.total) / (b.tokens / b.seconds.total) for a, b in pairs]
        return cls(
            tokens_per_second=speed,
            draftless=draftless,
            speedup=speed / draftless,
            median=median(ratios),
            decoding=(run.tokens / run.seconds.decoding) / (baseline.tokens / baseline.seconds.decoding),
            cpu=(run.tokens / run.seconds.cpu) / (baseline.tokens / baseline.seconds.cpu),
        )


def _mismatches(
    engine: TargetEngine,
    names: Sequence[str],
    prompts: Sequence[list[int]],
    images: Sequence[Images],
    run: Run,
    baseline: Run | None,
) -> list[Mismatch] | None:
    if baseline is None:
        return None
    dtype = run.decoded[0].dtype
    texts = (
        Texts(sample_id=name, prompt=prompt, tokens=generation.tokens, draftless=draftless.tokens, images=shown)
        for name, prompt, shown, generation, draftless in zip(
            names, prompts, images, run.generations, baseline.generations, strict=True
        )
    )
    found = (find_mismatch(engine, entry, dtype) for entry in texts)
    return [mismatch for mismatch in found if mismatch is not None]
