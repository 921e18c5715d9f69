"""Running several ways of decoding side by side on the same prompts, fairly.

Each runs on a batch of prompts before the next batch starts, in an order that rotates from batch to batch, so that a
machine whose speed drifts is slow for all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from torchspec.core.decoding.generation import Decoded, DecodeSettings, Generation, Seconds
from torchspec.core.decoding.plain import decode_plain
from torchspec.core.decoding.result import add_seconds
from torchspec.core.decoding.speculative import decode
from torchspec.core.errors import DataError
from torchspec.core.interfaces.algorithm import Drafter
from torchspec.core.interfaces.engine import Images, TargetEngine

Progress = Callable[[str, int, int], None]

WARMUP_TOKENS = 16
SEED_STRIDE = 1_000_003  # seeds of batches don't meet those of another run's seed


class PromptLike(Protocol):
    @property
    def sample_id(self) -> str: ...
    @property
    def input_ids(self) -> Collection[int]: ...
    @property
    def images(self) -> Images: ...


Prompt = TypeVar("Prompt", bound=PromptLike)


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """`warmup` batches are decoded shortly by every way of decoding before the clock starts."""

    max_new_tokens: int = 128
    draft_length: int = 5
    temperature: float = 0.0
    batch_size: int = 1
    seed: int = 0
    warmup: int = 1
    compare_draftless: bool = True

    def __post_init__(self) -> None:
        DecodeSettings(max_new_tokens=self.max_new_tokens, draft_length=self.draft_length, temperature=self.temperature)
        if self.batch_size < 1 or self.warmup < 0:
            raise ValueError(f"batch_size must be at least 1 and warmup 0, got {self.batch_size} and {self.warmup}")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of decoding. Without a drafter it is the baseline, and its draft length means nothing."""

    drafter: Drafter | None
    draft_length: int = 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    names: tuple[str, ...]
    prompts: tuple[list[int], ...]
    images: tuple[Images, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one way of decoding gave, batch by batch."""

    way: Variant
    decoded: list[Decoded] = field(default_factory=list)

    @property
    def generations(self) -> list[Generation]:
        return [generation for decoded in self.decoded for generation in decoded.generations]

    @property
    def tokens(self) -> int:
        return sum(decoded.tokens for decoded in self.decoded)

    @property
    def seconds(self) -> Seconds:
        return add_seconds([decoded.seconds for decoded in self.decoded])


def with_room(context: int, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts after which a target of so many positions can say something. DataError if there is none."""
    usable = [prompt for prompt in prompts if 0 < len(prompt.input_ids) < context]
    if not usable:
        found = f"each of the {len(prompts)} is empty or fills" if prompts else "the data gave none to put into"
        raise DataError(f"no prompt to decode: {found} the target's context of {context} tokens")
    return usable


def make_batches(engine: TargetEngine, prompts: Sequence[PromptLike], size: int) -> list[Batch]:
    """Prompts of similar length together, each with images alone, those without room for a new token left out."""
    kept = with_room(engine.describe().max_position_embeddings, prompts)
    texts = [prompt for prompt in kept if not prompt.images] if size > 1 else list(kept)
    if size > 1:
        texts.sort(key=lambda prompt: len(prompt.input_ids))
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    parts += [[prompt] for prompt in kept if prompt.images] if size > 1 else []
    return [
        Batch(
            names=tuple(prompt.sample_id for prompt in part),
            prompts=tuple([int(token) for token in prompt.input_ids] for prompt in part),
            images=tuple(prompt.images for prompt in part),
        )
        for part in parts
    ]


def measure(
    engine: TargetEngine,
    ways: Sequence[Variant],
    batches: Sequence[Batch],
    settings: EvalSettings,
    progress: Progress | None,
) -> list[Run]:
    """Every way of decoding on every batch, after the warm-up."""
    brief = replace(settings, max_new_tokens=min(WARMUP_TOKENS, settings.max_new_tokens))
    for batch in batches[: settings.warmup]:
        for way in ways:
            _decode(engine, way, batch, brief, 0)
    runs = [Run(way=way) for way in ways]
    done, total = 0, sum(len(batch.prompts) for batch in batches)
    for number, batch in enumerate(batches):
        turn = number % len(runs)
        for run in (*runs[turn:], *runs[:turn]):
            run.decoded.append(_decode(engine, run.way, batch, settings, number))
        done += len(batch.prompts)
        if progress is not None:
            progress("evaluate", done, total)
    return runs


def _decode(engine: TargetEngine, way: Variant, batch: Batch, settings: EvalSettings, number: int) -> Decoded:
    request = DecodeSettings(
        max_new_tokens=settings.max_new_tokens, draft_length=way.draft_length, temperature=settings.temperature
    )
    seed = (settings.seed * SEED_STRIDE + number) % 2**63
    if way.drafter is None:
        return decode_plain(engine, batch.prompts, request, seed=seed, images=batch.images)
    return decode(engine, way.drafter, batch.prompts, request, seed=seed, images=batch.images)
