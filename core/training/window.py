"""One optimizer window: its micro-batches forward and backward on this rank, then sums over all ranks.

Nothing is normalised here. Numerators, denominators and metrics are sums; they and the gradients add over
micro-batches and ranks, and the trainer divides once by the denominator of the whole window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchspec.core.data.batches import rank_micro_batches
from torchspec.core.features.memory import MemoryFeatureSink
from torchspec.core.interfaces.algorithm import KEEP_ALL, Algorithm, StepMemory, StepResult, TrainingSample
from torchspec.core.interfaces.engine import CaptureRequest, TargetEngine
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.timing import StepTimer

STAND_IN_TOKENS = 16


class Samples(Protocol):
    """A tokenised dataset."""

    @property
    def lengths(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> TrainingSample: ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything a window is computed with. `draft` is sharded."""

    algorithm: Algorithm
    draft: nn.Module
    head: TargetHead
    engine: TargetEngine
    memory: StepMemory = KEEP_ALL


@dataclass(kw_only=True)
class Sums:
    """Additive results: of this rank while they accumulate, of all ranks and on the CPU after `reduce`."""

    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def add(self, result: StepResult) -> None:
        parts = {"numerator": result.numerator, "denominator": result.denominator}
        parts |= {f"sums/{name}": value for name, value in result.sums.items()}
        for name, value in parts.items():
            kept = value.detach()
            self.values[name] = self.values[name] + kept if name in self.values else kept.clone()

    def reduce(self, context: ParallelContext) -> Sums:
        """One SUM all-reduce and one transfer to the host per dtype; integer counts stay exact."""
        reduced: dict[str, Tensor] = {}
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name in sorted(self.values):
            by_dtype.setdefault(self.values[name].dtype, []).append(name)
        for dtype in sorted(by_dtype, key=str):
            names = by_dtype[dtype]
            packed = torch.cat([self.values[name].reshape(-1) for name in names])
            all_reduce_sum(packed, context.data_group)
            shapes = [self.values[name].shape for name in names]
            pieces = torch.split(packed.cpu(), [shape.numel() for shape in shapes])
            reduced |= {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return Sums(values=reduced, tokens=context.sum([self.tokens])[0])

    @property
    def numerator(self) -> float:
        return float(self.values["numerator"])

    @property
    def denominator(self) -> float:
        return float(self.values["denominator"])

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {name.removeprefix("sums/"): v for name, v in self.values.items() if name.startswith("sums/")}


def all_reduce_sum(tensor: Tensor, group: ProcessGroup) -> None:
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)


@dataclass(frozen=True, kw_only=True)
class WindowResult:
    """Sums over all ranks, and each of this rank's micro-batches with its own numerator (for naming a bad sample)."""

    sums: Sums
    numerators: list[tuple[list[int], Tensor]]


def run_window(
    model: Model,
    samples: Samples,
    batch: Sequence[int],
    micro_batch_size: int,
    context: ParallelContext,
    timer: StepTimer,
) -> WindowResult:
    """Accumulate the window's gradients of sum(numerator) in the draft's shards and return the global sums.

    Gradients are reduced over ranks once, with the last micro-batch. Every rank runs the same number of
    micro-batches: a rank whose turn holds only holes runs a short stand-in without supervision, so the collectives
    inside the draft meet on all ranks.
    """
    micro_batches = rank_micro_batches(
        batch, rank=context.rank, world_size=context.world_size, micro_batch_size=micro_batch_size
    )
    assert isinstance(model.draft, FSDPModule)
    sums = Sums()
    numerators: list[tuple[list[int], Tensor]] = []
    for position, slots in enumerate(micro_batches):
        last = position == len(micro_batches) - 1
        model.draft.set_requires_gradient_sync(last)
        model.draft.set_is_last_backward(last)
        indices = [index for index in slots if index is not None]
        with timer.phase("data"):
            chosen = [samples[index] for index in indices] or [_stand_in(samples[batch[0]])]
        with timer.phase("capture"):
            features = capture(model, chosen)
        with timer.phase("forward"):
            masks = [sample.loss_mask_T for sample in chosen]
            result = model.algorithm.step(model.draft, model.head, features, masks, context.device, model.memory)
        with timer.phase("backward"):
            torch.autograd.backward(result.numerator)
        sums.add(result)
        sums.tokens += sum(sample.input_ids_T.numel() for sample in chosen) if indices else 0
        numerators.append((indices, result.numerator.detach()))
    _check_sharded(model.draft)
    with timer.phase("reduce"):
        return WindowResult(sums=sums.reduce(context), numerators=numerators)


def _check_sharded(draft: nn.Module) -> None:
    """FSDP reduces gradients from hooks on the tensors it finds in the draft's output; it must have found them."""
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad and not isinstance(parameter.grad, DTensor):
            raise TypeError(
                f"the gradient of {name!r} was not reduced over ranks: the draft's forward must use every parameter "
                "and return tensors, or tuples, lists or dicts of tensors (FSDP does not look into other objects)"
            )


def capture(model: Model, samples: Sequence[TrainingSample]) -> list[Features]:
    """The target's hidden states of each sample, in order."""
    sink = MemoryFeatureSink()
    requests = [
        CaptureRequest(record_id=str(slot), input_ids=sample.input_ids_T.tolist())
        for slot, sample in enumerate(samples)
    ]
    with torch.no_grad():
        references = model.engine.capture(requests, model.algorithm.taps, sink)
    return [sink.take(reference) for reference in references]


def _stand_in(sample: TrainingSample) -> TrainingSample:
    ids_T = sample.input_ids_T[:STAND_IN_TOKENS]
    mask_T = torch.zeros_like(ids_T, dtype=torch.bool)
    return TrainingSample(sample_id=sample.sample_id, input_ids_T=ids_T, loss_mask_T=mask_T)
