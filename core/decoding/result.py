"""What an evaluation found, with everything needed to compare it with somebody else's figures."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from torchspec.core.decoding.generation import FinishReason, Round, Seconds
from torchspec.core.decoding.lossless import Mismatch


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Counts over drafting rounds, as vLLM's counter has them, except that every round counts.

    A round's accepted tokens are those verification kept, also where the text ended among them (its end-of-turn
    token, or the limit): rounds are then alike wherever they fall, and a generous limit changes nothing.
    A round in which nothing was proposed is a round with nothing accepted (vLLM leaves those of n-gram drafting out).

    per_position  unconditional: entry j is the share of all rounds with more than j tokens accepted
    length        accepted tokens per round plus the target's own one = 1 + sum(per_position), exactly;
                  1.0 if there was no round at all
    """

    rounds: int
    proposed: int
    accepted: int
    per_position: tuple[float, ...]
    length: float


def count_acceptance(rounds: Iterable[Round], draft_length: int) -> Acceptance:
    """Add up rounds that drafted at most `draft_length` tokens each."""
    reached = [0] * draft_length
    total = proposed = accepted = 0
    for entry in rounds:
        total += 1
        proposed += entry.proposed
        accepted += entry.accepted
        for position in range(entry.accepted):
            reached[position] += 1
    per_position = tuple(count / total if total else 0.0 for count in reached)
    length = 1.0 + (accepted / total if total else 0.0)
    return Acceptance(rounds=total, proposed=proposed, accepted=accepted, per_position=per_position, length=length)


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """One prompt's text and how its drafting went; all token ids. `accepted` has one entry per round."""

    sample_id: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    accepted: tuple[int, ...]
    finish: FinishReason


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Measured by decoding. None where draftless decoding was not run, or at temperature > 0 for the comparison.

    acceptance_*        see `Acceptance`
    tokens              new tokens of all prompts, the first of each (which the prefill gives) included
    tokens_per_round    tokens of rounds that reached the text, per round; at most acceptance_length, since the end of a
                        text cuts its last round. SGLang's accept length is tokens / rounds, with the first token too
    tokens_per_second   tokens / wall seconds of decoding all prompts, the target's and the draft's prefill included
    speedup             ratio of the two tokens_per_second; speedup_median is the median over batches of the ratio
                        within the batch, which a hiccup of the machine does not move
    decoding_speedup    the same ratio without the target's prefill
    cpu_speedup         the same ratio in tokens per processor second: on a busy machine that computes on the CPU, the
                        steadiest of them; on an accelerator it compares only what the host does
    lossless            every text equals draftless greedy decoding token for token
    tie_mismatches      texts that first differ where the two tokens' logits are equal within rounding
    other_mismatches    texts that first differ elsewhere
    longest_draft       most tokens that a round drafted: fewer than draft_length where the draft has no more to give
    skipped             prompts left out because they fill the target's context
    seconds             see `Seconds`, added over batches
    """

    acceptance_length: float
    acceptance_per_position: tuple[float, ...]
    tokens_per_second: float
    tokens_per_second_draftless: float | None
    speedup: float | None
    speedup_median: float | None
    decoding_speedup: float | None
    cpu_speedup: float | None
    lossless: bool | None
    tie_mismatches: int | None
    other_mismatches: int | None
    rounds: int
    proposed: int
    accepted: int
    longest_draft: int
    tokens: int
    tokens_per_round: float
    prompts: int
    skipped: int
    draft_length: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int
    dtype: str
    seconds: Seconds
    seconds_draftless: Seconds | None
    machine: dict[str, Any]
    mismatches: tuple[Mismatch, ...] = ()
    records: tuple[PromptRecord, ...] = ()

    def to_json(self, *, records: bool = False) -> dict[str, Any]:
        """Plain values under the field names; `records` adds every prompt's tokens and rounds."""
        values = asdict(self)
        if not records:
            del values["records"]
        return {**values, "drafting": "chain", "averaging": "over drafting rounds of all prompts"}


def add_seconds(parts: Sequence[Seconds]) -> Seconds:
    return Seconds(
        prefill=sum(part.prefill for part in parts),
        draft=sum(part.draft for part in parts),
        target=sum(part.target for part in parts),
        total=sum(part.total for part in parts),
        cpu=sum(part.cpu for part in parts),
    )


def machine_facts(device: torch.device, engine: object) -> dict[str, Any]:
    """What a speed depends on besides the models: hardware, threads, versions."""
    name = platform.processor() or platform.machine()
    if device.type != "cpu":
        name = str(torch.get_device_module(device).get_device_name(device))
    return {
        "device": device.type,
        "device_name": name,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "engine": type(engine).__qualname__,
    }
