"""One optimizer window: its micro-batches forward and backward on this rank, then sums over all ranks.

Nothing is normalised here. Numerators, denominators and metrics are sums; they and the gradients add over
micro-batches and ranks, and the trainer divides once by the denominator of the whole window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchspec.core.interfaces.algorithm import START, Moment, StepResult
from torchspec.core.parallel.ranks import Ranks
from torchspec.core.training.capturing import Documents, Model, Samples, Texts
from torchspec.core.training.feed import Passes
from torchspec.core.training.offload import offloaded
from torchspec.core.training.plan import Turn
from torchspec.core.training.sharding import cast_alone
from torchspec.core.training.timing import StepTimer


@dataclass
class WrittenCounts:
    """Texts and their tokens; of those that were written with a draft, its rounds and the tokens accepted in them."""

    texts: int = 0
    tokens: int = 0
    rounds: int = 0
    accepted: int = 0

    def add(self, texts: Texts) -> None:
        for text in texts.values():
            if not isinstance(text, str):
                self.texts += 1
                self.tokens += len(text.tokens)
                self.rounds += text.rounds or 0
                self.accepted += text.accepted_tokens or 0

    def to_json(self) -> dict[str, float]:
        """`acceptance_length` where a draft took part: tokens of a round, the target's own included."""
        length = {"acceptance_length": 1 + self.accepted / self.rounds} if self.rounds else {}
        return {"texts": self.texts, "tokens": self.tokens, **length}


@dataclass(kw_only=True)
class Sums:
    """Additive results: of this rank while they accumulate, of all ranks and on the CPU after `reduce`.

    `positions` are those of the rows, `tokens` and padding; `quarantined` counts samples, whose tokens are nobody's.
    `written`: by the target, for this window.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    positions: int = 0
    quarantined: int = 0
    written: WrittenCounts = field(default_factory=lambda: WrittenCounts())

    def add(self, result: StepResult, *, counts: bool = True) -> None:
        """`counts`: not so for a stand-in, whose tokens are nobody's."""
        parts = {"numerator": result.numerator, "denominator": result.denominator}
        parts |= {f"sums/{name}": value for name, value in result.sums.items()}
        for name, value in parts.items():
            kept = value.detach() if counts else torch.zeros_like(value)
            self.values[name] = self.values[name] + kept if name in self.values else kept.clone()

    def reduce(self, context: Ranks) -> Sums:
        """One SUM all-reduce and one transfer to the host per dtype; integer counts stay exact."""
        reduced: dict[str, Tensor] = {}
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name in sorted(self.values):
            by_dtype.setdefault(self.values[name].dtype, []).append(name)
        for dtype in sorted(by_dtype, key=str):
            names = by_dtype[dtype]
            packed = torch.cat([self.values[name].reshape(-1) for name in names])
            context.add_up(packed)
            shapes = [self.values[name].shape for name in names]
            pieces = torch.split(packed.cpu(), [shape.numel() for shape in shapes])
            reduced |= {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        counts = [self.tokens, self.positions, self.quarantined]
        tokens, positions, quarantined, *written = context.sum([*counts, *astuple(self.written)])
        return Sums(
            values=reduced,
            tokens=tokens,
            positions=positions,
            quarantined=quarantined,
            written=WrittenCounts(*written),
        )

    @property
    def numerator(self) -> float:
        return float(self.values["numerator"])

    @property
    def denominator(self) -> float:
        return float(self.values["denominator"])

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {name.removeprefix("sums/"): v for name, v in self.values.items() if name.startswith("sums/")}


@dataclass(frozen=True, kw_only=True)
class WindowResult:
    """Sums over all ranks, and each of this rank's micro-batches with its own numerator (for naming a bad sample).

    `quarantined`: sample -> why it could not be captured, of all ranks.
    """

    sums: Sums
    numerators: list[tuple[list[int], Tensor]]
    quarantined: dict[int, str] = field(default_factory=dict)


def run_window(
    model: Model,
    samples: Samples,
    turns: Sequence[Turn],
    feed: Passes,
    context: Ranks,
    timer: StepTimer,
    moment_of: Callable[[Documents], Moment] = lambda documents: START,
) -> WindowResult:
    """Accumulate the window's gradients of sum(numerator) in the draft's shards and return the global sums.

    Gradients are reduced over ranks once, with the last micro-batch. Every rank runs the same number of
    micro-batches: a rank whose turn is a hole runs a short stand-in without supervision, so the collectives inside the
    draft meet on all ranks. A draft that is not sharded is that of a process without others.
    """
    sharded = model.draft if isinstance(model.draft, FSDPModule) else None
    sums = Sums()
    numerators: list[tuple[list[int], Tensor]] = []
    quarantined: dict[int, str] = {}
    for number, turn in enumerate(turns, start=1):
        if sharded is not None:
            sharded.set_requires_gradient_sync(number == len(turns))
            sharded.set_is_last_backward(number == len(turns))
        with timer.phase("data"):
            loaded = feed.load(turn, samples)
        with timer.phase("capture"):
            rows, missing = feed.rows(turn, loaded)
            holes = loaded[context.data_rank].unwritten | missing
        with cast_alone(model.draft, model.cast):
            with timer.phase("forward"), offloaded(model.draft, activations=model.offload_activations):
                moment = moment_of(loaded[context.data_rank])
                device = model.device(context.device)
                result = model.algorithm.step(model.draft, model.head, rows, device, model.memory, moment)
                del device  # in FP8 it keeps the weights of this micro-batch
            with timer.phase("backward"):
                torch.autograd.backward(result.numerator)
        mine = loaded[context.data_rank]
        sums.add(result, counts=bool(mine.indices))
        if mine.indices and context.sequence_rank == 0:
            kept = (sample for number, sample in enumerate(mine.samples) if number not in holes)
            sums.tokens += sum(sample.input_ids_T.numel() for sample in kept)
            sums.positions += len(mine.packs) * rows.layout.padded
            sums.quarantined += len(holes)
            sums.written.add(mine.texts)
        if mine.indices:
            quarantined |= {mine.indices[number]: reason for number, reason in holes.items()}
        numerators.append((list(mine.indices), result.numerator.detach()))
    if sharded is not None:
        _check_sharded(model.draft)
    with timer.phase("reduce"):
        total = sums.reduce(context)
        if total.quarantined:  # known on every rank, so that all of them gather or none
            parts = context.gather(quarantined)
            quarantined = {int(index): why for part in parts for index, why in part.items() if why}
        return WindowResult(sums=total, numerators=numerators, quarantined=quarantined)


def _check_sharded(draft: nn.Module) -> None:
    """FSDP reduces gradients from hooks on the tensors it finds in the draft's output; it must have found them."""
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad and not isinstance(parameter.grad, DTensor):
            raise TypeError(
                f"the gradient of {name!r} was not reduced over ranks: the draft's forward must use every parameter "
                "and return tensors, or tuples, lists or dicts of tensors (FSDP does not look into other objects)"
            )
