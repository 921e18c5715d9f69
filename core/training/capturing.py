"""The features of a micro-batch: captured by the ranks whose turn it is, cut for the ranks that share it.

A sample that cannot be captured leaves a hole: its tokens stay where they are, so that every rank's shapes and
collectives are those that were planned, and nothing of it is supervised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from torchspec.core.data.batches import MicroBatch
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.features.rows import FeatureRows, Packs, TokenRows
from torchspec.core.features.spread import Hidden, spread_features
from torchspec.core.interfaces.algorithm import KEEP_ALL, Algorithm, StepMemory, TrainingSample
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import CaptureRequest, ServedText, TargetEngine
from torchspec.core.interfaces.features import Features, NormState, Quarantined
from torchspec.core.interfaces.target import TargetHead
from torchspec.core.ops.fp8 import MULTIPLE
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.parallel.sequence import Exchange, SequenceGroup
from torchspec.core.training.fp8 import Fp8Compute

STAND_IN_TOKENS = 16


Texts = Mapping[int, ServedText | str]
"""Of a document's number; or why there is none."""


class Samples(Protocol):
    """A tokenised dataset."""

    @property
    def lengths(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> TrainingSample: ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything a window is computed with. `draft` is sharded; `exchange` is for sequences that ranks share.
    `engine` None: features come from elsewhere, and nothing is decoded here.

    `cast`: what the parameters of a draft that is not sharded are computed in, where that is not what they are kept in.
    `fp8`: its linear maps are computed in FP8. `offload_activations`: what the forward pass keeps for the backward one
    waits in the host's memory.
    """

    algorithm: Algorithm
    draft: nn.Module
    head: TargetHead
    engine: TargetEngine | None
    memory: StepMemory = KEEP_ALL
    exchange: Exchange = "gather"
    offload_activations: bool = False
    cast: torch.dtype | None = None
    fp8: Fp8Compute | None = None

    @property
    def slab(self) -> int:
        """What a rank owns of a sequence is a multiple of so many rows."""
        return 1 if self.fp8 is None else MULTIPLE

    def device(self, device: Device) -> Device:
        """`device`, for one micro-batch."""
        return device if self.fp8 is None else self.fp8.device(device)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The samples of one micro-batch; without `indices` they stand in for none.

    `texts`: what the target wrote for each of them, by their numbers, where it is asked to.
    """

    indices: tuple[int, ...]
    samples: Sequence[TrainingSample]
    packs: Packs
    texts: Texts = field(default_factory=dict)

    @property
    def unwritten(self) -> dict[int, str]:
        """Those for which nothing was written -> why."""
        return {number: text for number, text in self.texts.items() if isinstance(text, str)}

    @property
    def real(self) -> Sequence[TrainingSample]:
        """Those to be captured: none of what stands in."""
        return self.samples if self.indices else ()

    @classmethod
    def of(cls, micro_batch: MicroBatch, samples: Samples, some: int) -> Documents:
        chosen = [samples[index] for index in micro_batch.samples]
        if not chosen:
            return cls(indices=(), samples=[_stand_in(samples[some])], packs=((0,),))
        return cls(indices=micro_batch.samples, samples=chosen, packs=micro_batch.packs)


def captured_rows(
    model: Model, loaded: Mapping[int, Documents], context: ParallelContext
) -> tuple[FeatureRows, dict[int, str]]:
    """The features of this rank's micro-batch, of a shared sequence its share; and its holes: document -> reason.

    Ranks that hold a target together run all their micro-batches through it, one after the other, and keep their own.
    Else the ranks that share sequences divide the documents among themselves and send each other what they own. Where
    one of them could not capture a document the others know that it is a hole, but not why (the reason is "").
    """
    mine = loaded[context.data_rank]
    sequence = context.sequence_group(model.exchange, model.slab)
    owners = None
    found: dict[int, Features | Quarantined] = {}
    if context.tensor.size() > 1:
        for index, documents in loaded.items():
            features = capture(model, documents.real)
            if index == context.data_rank:
                found = dict(enumerate(features))
    else:
        owners = assigned(mine.samples, context.sequence_size)
        numbers = [number for number, owner in enumerate(owners) if owner == context.sequence_rank]
        if mine.real:
            found = dict(zip(numbers, capture(model, [mine.samples[n] for n in numbers]), strict=True))
    if not mine.real:
        made = range(len(mine.samples)) if owners is None else numbers
        found = {n: nothing_of(model, mine.samples[n], "post_norm") for n in made}
    holes = {number: each.reason for number, each in found.items() if isinstance(each, Quarantined)}
    whole = {number: each for number, each in found.items() if isinstance(each, Features)}
    if sequence is not None and owners is not None:
        holes = holes_of_all(model, holes, len(mine.samples), sequence)
    state: NormState = next((features.norm_state for features in whole.values()), "post_norm")
    for number in found.keys() - whole.keys():
        whole[number] = nothing_of(model, mine.samples[number], state)
    masks = [
        torch.zeros_like(sample.loss_mask_T) if number in holes else sample.loss_mask_T
        for number, sample in enumerate(mine.samples)
    ]
    if sequence is None:
        return FeatureRows.of([whole[n] for n in range(len(mine.samples))], masks, mine.packs, model.slab), holes
    tokens = TokenRows.of([sample.input_ids_T for sample in mine.samples], masks, mine.packs)
    rows = spread_features(
        {number: hidden_of(model, features) for number, features in whole.items()},
        tokens,
        mine.packs,
        sequence,
        halo=model.algorithm.halo,
        like=hidden_like(model),
        owners=owners,
    )
    return rows, holes


def holes_of_all(model: Model, holes: dict[int, str], documents: int, sequence: SequenceGroup) -> dict[int, str]:
    """The holes that any rank of the sequence found; the masks of all of them must say the same."""
    flags = torch.tensor([number in holes for number in range(documents)], dtype=torch.int32)
    found = sequence.sum(flags.to(model.head.embedding_VH.device)).nonzero().flatten().tolist()
    return {number: holes.get(number, "") for number in found}


def nothing_of(model: Model, sample: TrainingSample, state: NormState) -> Features:
    """Zeros of the sample's length."""
    like, length = hidden_like(model), sample.input_ids_T.numel()
    size = model.head.embedding_VH.shape[1]
    return Features(
        input_ids_T=sample.input_ids_T,
        taps_TNH=like.taps_TF.new_zeros(length, len(model.algorithm.taps), size),
        last_TH=like.last_TH.new_zeros(length, size),
        tap_layers=model.algorithm.taps,
        norm_state=state,
    )


def assigned(samples: Sequence[TrainingSample], ranks: int) -> list[int]:
    """Which of the ranks captures each document: the longest first, each to the rank with the fewest tokens so far."""
    owners, load = [0] * len(samples), [0] * ranks
    lengths = [sample.input_ids_T.numel() for sample in samples]
    for number in sorted(range(len(samples)), key=lambda number: -lengths[number]):
        owners[number] = load.index(min(load))
        load[owners[number]] += lengths[number]
    return owners


def hidden_of(model: Model, features: Features) -> Hidden:
    like = hidden_like(model)
    last_TH = model.head.normed(features.last_TH, features.norm_state)
    return Hidden(taps_TF=features.taps_TNH.flatten(1).to(like.taps_TF), last_TH=last_TH.to(like.last_TH))


def hidden_like(model: Model) -> Hidden:
    """No rows of the features that the target makes, in its precision."""
    embedding_VH = model.head.embedding_VH
    size = embedding_VH.shape[1]
    return Hidden(
        taps_TF=embedding_VH.new_empty(0, len(model.algorithm.taps) * size), last_TH=embedding_VH.new_empty(0, size)
    )


def capture(model: Model, samples: Sequence[TrainingSample]) -> list[Features | Quarantined]:
    """The target's hidden states of each sample, in order, or why there are none."""
    if not samples:
        return []
    assert model.engine is not None
    store = MemoryStore()
    requests = [
        CaptureRequest(record_id=str(slot), input_ids=sample.input_ids_T.tolist(), images=sample.images)
        for slot, sample in enumerate(samples)
    ]
    with torch.no_grad():
        found = model.engine.capture(requests, model.algorithm.taps, store)
    return [each if isinstance(each, Quarantined) else take(store, each) for each in found]


def _stand_in(sample: TrainingSample) -> TrainingSample:
    ids_T = sample.input_ids_T[:STAND_IN_TOKENS]
    mask_T = torch.zeros_like(ids_T, dtype=torch.bool)
    return TrainingSample(sample_id=sample.sample_id, input_ids_T=ids_T, loss_mask_T=mask_T)


def stand_in() -> TrainingSample:
    """For a rank that has no sample at all."""
    ids_T = torch.zeros(STAND_IN_TOKENS, dtype=torch.int64)
    return _stand_in(TrainingSample(sample_id="", input_ids_T=ids_T, loss_mask_T=ids_T.bool()))
