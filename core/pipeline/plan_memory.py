"""How much memory a rank will need, part by part and moment by moment of a training step, from shapes alone.

A step has five moments at which memory can peak. Every part says at which of them it is there; the peak is the moment
with the greatest sum:

    capture     the target runs over a micro-batch, its hidden states are copied out
    loss        the draft has been unrolled, all its activations wait for the backward pass
    backward    the loss's gradients are scaled and go into the unroll's last step
    reduction   the whole draft's gradients are packed and summed over ranks
    optimizer   the update of this rank's shards

On a CPU the process itself counts (docs/training.md), and what malloc does with freed memory: large blocks go back to
the system, small ones stay in the heap. Then a moment costs what the heap ever held, not what it holds now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchspec.core.pipeline.plan_parts import draft_parts, loss_parts, micro_batch_parts, target_parts
from torchspec.core.pipeline.plan_terms import MOMENTS, Load, Models, Moment, Part

HEAP_KEPT = 1 << 30
"""So much of the heap at most stays when all of it is free: what the CPU adapter asks malloc for."""
HEAP_GAPS, HEAP_GAPS_MADE_AGAIN = 0.3, 0.45
"""What is lost between blocks, for every byte that a step takes from the heap and gives back: measured, the second
where layers are made again among the outputs that stay."""
KEPT = "freed and kept"
FIRST_USE = 24_000_000
"""What a first step adds to a process that has imported everything: code paged in, workspaces, threads."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a rank needs: `parts` are those at `moment`, the peak; `moments` is the sum at each."""

    moment: Moment
    parts: tuple[Part, ...]
    moments: dict[Moment, int]

    @property
    def bytes(self) -> int:
        return self.moments[self.moment]


def estimate(models: Models, load: Load) -> Need:
    """For a text that is supervised throughout; one that is not needs less. Validation and export are not in it."""
    made = (draft_parts, target_parts, micro_batch_parts, loss_parts)
    parts = [part for make in made for part in make(models, load)]
    if models.process is not None:
        parts = [_process(models.process), *parts, *_heap(parts, load)]
    parts = [part for part in parts if part.bytes]
    sums = {moment: sum(part.bytes for part in parts if moment in part.moments) for moment in MOMENTS}
    # What malloc keeps makes moments alike: of those, the one that has most in use.
    highest = [moment for moment in MOMENTS if sums[moment] >= 0.99 * max(sums.values())]
    peak = max(highest, key=lambda moment: sum(part.bytes for part in parts if _in_use(part, moment)))
    return Need(moment=peak, parts=tuple(part for part in parts if peak in part.moments), moments=sums)


def _in_use(part: Part, moment: Moment) -> bool:
    return moment in part.moments and part.name != KEPT


def _process(resident: int) -> Part:
    total = resident + FIRST_USE
    how = f"interpreter and libraries: {resident // 10**6} MB in this process now, {FIRST_USE // 10**6} MB by first use"
    return Part(name="process", bytes=total, how=how, returned=total)


def _heap(parts: Sequence[Part], load: Load) -> list[Part]:
    """What the heap holds beyond what is in use, at each moment."""
    small = {m: sum(part.bytes - part.returned for part in parts if m in part.moments) for m in MOMENTS}
    always = sum(part.bytes - part.returned for part in parts if part.moments == MOMENTS)
    fullest = max(small.values())
    how = f"of {fullest // 10**6} MB in small blocks at another moment, which malloc does not give back"
    kept = [Part(name=KEPT, bytes=min(fullest - small[m], HEAP_KEPT), how=how, moments=(m,)) for m in MOMENTS]
    lost = HEAP_GAPS_MADE_AGAIN if load.memory.recompute else HEAP_GAPS
    gaps, how = int(lost * (fullest - always)), f"{lost:.0%} of what a step takes in small blocks"
    return [*kept, Part(name="gaps in the heap", bytes=gaps, how=how)]
