"""What decoding is asked for, what it hands back, and when a sequence ends: the same rules with and without a draft."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from torchspec.core.errors import DataError
from torchspec.core.interfaces.engine import DecodeSession, Images, TargetEngine, TargetSpec

FinishReason = Literal["eos", "length", "context"]
Phase = Literal["prefill", "draft", "target"]


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """`draft_length` is the number of tokens drafted per round (a chain); draftless decoding ignores it."""

    max_new_tokens: int = 128
    draft_length: int = 5
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.draft_length < 1:
            raise ValueError(f"draft_length must be at least 1, got {self.draft_length}")
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One drafting round of one sequence.

    slot      i: the last position whose taps the draft had seen (docs: the slot of the training forward);
              token i + 1 was the newest known one, drafted tokens stand at i + 2 .. i + 1 + proposed
    proposed  drafted tokens that were verified
    accepted  leading ones among them that the target agreed with, whether or not the text ends among them
    emitted   tokens this round added to the text: accepted + 1, fewer where the text ended
    """

    slot: int
    proposed: int
    accepted: int
    emitted: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """New tokens of one prompt, the end-of-turn token included; `rounds` is empty without a draft.

    The first token comes from the prompt's prefill, so len(tokens) = 1 + sum of emitted.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    rounds: tuple[Round, ...]
    finish: FinishReason


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Wall seconds of one `decode` call; `total` also holds verification and bookkeeping.

    prefill  the target's forward pass over the prompts
    draft    the draft's work, its own pass over the prompts included
    target   the target's steps and cache rollbacks
    cpu      processor seconds of this process, all threads: unlike the others, not moved by what else the machine does
    """

    prefill: float
    draft: float
    target: float
    total: float
    cpu: float

    @property
    def decoding(self) -> float:
        """Everything but the target's prefill."""
        return self.total - self.prefill


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One generation per prompt, in order, where the time went, and the device and precision the target ran in."""

    generations: list[Generation]
    seconds: Seconds
    device: torch.device
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return sum(len(generation.tokens) for generation in self.generations)


class Stopwatch:
    """Adds up wall seconds per phase, waiting for the accelerator at the end of each."""

    def __init__(self) -> None:
        self._start, self._cpu = time.perf_counter(), time.process_time()
        self._phases: dict[Phase, float] = {"prefill": 0.0, "draft": 0.0, "target": 0.0}
        self.device = torch.device("cpu")

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self._phases[phase] += time.perf_counter() - start

    def seconds(self) -> Seconds:
        total, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
        return Seconds(total=total, cpu=cpu, **self._phases)


@dataclass(kw_only=True, eq=False)
class Row:
    """A sequence while it grows. `index` is its place among the prompts."""

    index: int
    prompt_tokens: int
    limit: int  # new tokens that max_new_tokens and the context allow
    context: int
    eos: frozenset[int]
    finish: FinishReason | None = None
    tokens: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens known so far, the prompt's included."""
        return self.prompt_tokens + len(self.tokens)

    @property
    def room(self) -> int:
        """Tokens that still fit the context; what is drafted must stay inside it too."""
        return self.context - self.length

    def extend(self, tokens: Sequence[int]) -> int:
        """Append tokens up to the first end-of-turn or the limit; -> how many were taken."""
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            if token in self.eos:
                self.finish = "eos"
            elif len(self.tokens) == self.limit:
                self.finish = "context" if self.room == 0 else "length"
            if self.finish is not None:
                return count
        return len(tokens)

    def generation(self) -> Generation:
        assert self.finish is not None
        return Generation(
            prompt_tokens=self.prompt_tokens,
            tokens=tuple(self.tokens),
            rounds=tuple(self.rounds),
            finish=self.finish,
        )


def start_rows(prompts: Sequence[Sequence[int]], target: TargetSpec, settings: DecodeSettings) -> list[Row]:
    """One row per prompt; DataError for a prompt that is empty or leaves no room for a new token."""
    context = target.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise DataError(
                f"prompt {index} of the batch has {len(prompt)} tokens; the target at {target.path} needs between 1 "
                f"and {context - 1} (its context holds {context}): shorten it or leave it out"
            )
    return [
        Row(
            index=index,
            prompt_tokens=len(prompt),
            limit=min(settings.max_new_tokens, context - len(prompt)),
            context=context,
            eos=frozenset(target.eos_token_ids),
        )
        for index, prompt in enumerate(prompts)
    ]


def opened(
    engine: TargetEngine, prompts: Sequence[Sequence[int]], taps: Sequence[int], images: Sequence[Images]
) -> DecodeSession:
    """A session over the prompts, with their images if there are any: engines without images need not know the word."""
    return engine.open(prompts, taps, images=images) if any(images) else engine.open(prompts, taps)
