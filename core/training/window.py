"""One optimizer window: its micro-batches forward and backward on this rank, then sums over all ranks.

Nothing is normalised here. Numerators, denominators and metrics are sums; they and the gradients add over
micro-batches and ranks, and the trainer divides once by the denominator of the whole window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchspec.core.data.batches import MicroBatch, packed_micro_batches, rank_micro_batches
from torchspec.core.features.memory import MemoryFeatureSink
from torchspec.core.features.rows import FeatureRows, Packs, TokenRows
from torchspec.core.features.spread import Hidden, spread_features
from torchspec.core.interfaces.algorithm import KEEP_ALL, Algorithm, StepMemory, StepResult, TrainingSample
from torchspec.core.interfaces.engine import CaptureRequest, TargetEngine
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.parallel.sequence import Exchange
from torchspec.core.training.offload import offloaded
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
    """Everything a window is computed with. `draft` is sharded; `exchange` is for sequences that ranks share.

    `offload_activations`: what the forward pass keeps for the backward one waits in the host's memory.
    """

    algorithm: Algorithm
    draft: nn.Module
    head: TargetHead
    engine: TargetEngine
    memory: StepMemory = KEEP_ALL
    exchange: Exchange = "gather"
    offload_activations: bool = False


@dataclass(kw_only=True)
class Sums:
    """Additive results: of this rank while they accumulate, of all ranks and on the CPU after `reduce`.

    `positions` are those of the rows, `tokens` and padding.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    positions: int = 0

    def add(self, result: StepResult, *, counts: bool = True) -> None:
        """`counts`: not so for a stand-in, whose tokens are nobody's."""
        parts = {"numerator": result.numerator, "denominator": result.denominator}
        parts |= {f"sums/{name}": value for name, value in result.sums.items()}
        for name, value in parts.items():
            kept = value.detach() if counts else torch.zeros_like(value)
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
            all_reduce_sum(packed, context.every_group)
            shapes = [self.values[name].shape for name in names]
            pieces = torch.split(packed.cpu(), [shape.numel() for shape in shapes])
            reduced |= {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        tokens, positions = context.sum([self.tokens, self.positions])
        return Sums(values=reduced, tokens=tokens, positions=positions)

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


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How global batches are cut into forward passes: at most so many samples, or one packed row of so many tokens."""

    micro_batch_size: int
    row_tokens: int | None = None
    equal_length: float = math.inf

    def micro_batches(self, batch: Sequence[int], lengths: Sequence[int], rank: int, ranks: int) -> list[MicroBatch]:
        """Those of one data index."""
        if self.row_tokens is None:
            return rank_micro_batches(batch, rank=rank, world_size=ranks, micro_batch_size=self.micro_batch_size)
        return packed_micro_batches(
            batch,
            lengths,
            rank=rank,
            world_size=ranks,
            row_tokens=self.row_tokens,
            equal_length=self.equal_length,
        )


def run_window(
    model: Model, samples: Samples, batch: Sequence[int], cut: Cut, context: ParallelContext, timer: StepTimer
) -> WindowResult:
    """Accumulate the window's gradients of sum(numerator) in the draft's shards and return the global sums.

    Gradients are reduced over ranks once, with the last micro-batch. Every rank runs the same number of
    micro-batches: a rank whose turn is a hole runs a short stand-in without supervision, so the collectives inside the
    draft meet on all ranks.
    """
    shares = {
        index: cut.micro_batches(batch, samples.lengths, index, context.data_size) for index in context.captured_with
    }
    assert isinstance(model.draft, FSDPModule)
    sums = Sums()
    numerators: list[tuple[list[int], Tensor]] = []
    turns = len(shares[context.data_rank])
    for turn in range(turns):
        model.draft.set_requires_gradient_sync(turn == turns - 1)
        model.draft.set_is_last_backward(turn == turns - 1)
        with timer.phase("data"):
            loaded = {index: Documents.of(share[turn], samples, batch[0]) for index, share in shares.items()}
        with timer.phase("capture"):
            rows = captured_rows(model, loaded, context)
        with timer.phase("forward"), offloaded(model.draft, activations=model.offload_activations):
            result = model.algorithm.step(model.draft, model.head, rows, context.device, model.memory)
        with timer.phase("backward"):
            torch.autograd.backward(result.numerator)
        mine = loaded[context.data_rank]
        sums.add(result, counts=bool(mine.indices))
        if mine.indices and context.sequence_rank == 0:
            sums.tokens += sum(sample.input_ids_T.numel() for sample in mine.samples)
            sums.positions += len(mine.packs) * rows.layout.padded
        numerators.append((list(mine.indices), result.numerator.detach()))
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


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The samples of one micro-batch; without `indices` they stand in for none."""

    indices: tuple[int, ...]
    samples: Sequence[TrainingSample]
    packs: Packs

    @classmethod
    def of(cls, micro_batch: MicroBatch, samples: Samples, some: int) -> Documents:
        chosen = [samples[index] for index in micro_batch.samples]
        if not chosen:
            return cls(indices=(), samples=[_stand_in(samples[some])], packs=((0,),))
        return cls(indices=micro_batch.samples, samples=chosen, packs=micro_batch.packs)


def captured_rows(model: Model, loaded: Mapping[int, Documents], context: ParallelContext) -> FeatureRows:
    """The features of this rank's micro-batch, of a shared sequence its share.

    Ranks that hold a target together run all their micro-batches through it, one after the other, and keep their own.
    Else the ranks that share sequences divide the documents among themselves and send each other what they own.
    """
    mine = loaded[context.data_rank]
    sequence = context.sequence_group(model.exchange)
    if context.tensor.size() > 1:
        found = {}
        for index, documents in loaded.items():
            features = capture(model, documents.samples)
            if index == context.data_rank:
                found = dict(enumerate(features))
        owners = None
    else:
        owners = _owners(mine.samples, context.sequence_size)
        numbers = [number for number, owner in enumerate(owners) if owner == context.sequence_rank]
        found = dict(zip(numbers, capture(model, [mine.samples[n] for n in numbers]), strict=True))
    masks = [sample.loss_mask_T for sample in mine.samples]
    if sequence is None:
        return FeatureRows.of([found[n] for n in range(len(mine.samples))], masks, mine.packs)
    tokens = TokenRows.of([sample.input_ids_T for sample in mine.samples], masks, mine.packs)
    return spread_features(
        {number: _hidden(model, features) for number, features in found.items()},
        tokens,
        mine.packs,
        sequence,
        halo=model.algorithm.halo,
        like=_hidden_like(model),
        owners=owners,
    )


def _owners(samples: Sequence[TrainingSample], ranks: int) -> list[int]:
    """Which rank captures each document: the longest first, each to the rank with the fewest tokens so far."""
    owners, load = [0] * len(samples), [0] * ranks
    lengths = [sample.input_ids_T.numel() for sample in samples]
    for number in sorted(range(len(samples)), key=lambda number: -lengths[number]):
        owners[number] = load.index(min(load))
        load[owners[number]] += lengths[number]
    return owners


def _hidden(model: Model, features: Features) -> Hidden:
    like = _hidden_like(model)
    last_TH = model.head.normed(features.last_TH, features.norm_state)
    return Hidden(taps_TF=features.taps_TNH.flatten(1).to(like.taps_TF), last_TH=last_TH.to(like.last_TH))


def _hidden_like(model: Model) -> Hidden:
    """No rows of the features that the target makes, in its precision."""
    embedding_VH = model.head.embedding_VH
    size = embedding_VH.shape[1]
    return Hidden(
        taps_TF=embedding_VH.new_empty(0, len(model.algorithm.taps) * size), last_TH=embedding_VH.new_empty(0, size)
    )


def capture(model: Model, samples: Sequence[TrainingSample]) -> list[Features]:
    """The target's hidden states of each sample, in order."""
    if not samples:
        return []
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
