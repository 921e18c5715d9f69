"""From a configuration to what decides a rank's memory: `plan_memory.estimate` of any variant of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from torchspec.core import registry
from torchspec.core.attention.volume import Traffic
from torchspec.core.config.schema import RunConfig
from torchspec.core.data import cache
from torchspec.core.data.dataset import DatasetSettings, planned_lengths
from torchspec.core.data.rows import RowReader
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.device import Device, DeviceSpec
from torchspec.core.interfaces.engine import EngineSpec, TargetSpec
from torchspec.core.interfaces.features import NormState
from torchspec.core.interfaces.target import VocabularyMap, VocabularyShards
from torchspec.core.models.target_quantisation import unread
from torchspec.core.models.target_spec import running_dtype
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.ops.fp8 import fits
from torchspec.core.pipeline.assembly import step_memory
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.parallel_fit import COMPUTE, choose_exchange, choose_logits, logits_ranks, row_tokens
from torchspec.core.pipeline.plan_memory import Need, estimate
from torchspec.core.pipeline.plan_terms import Load, Models
from torchspec.core.pipeline.topology_fit import trainer_fraction
from torchspec.core.training.fp8 import fp8_weights

GB = 10**9
DEVICES_ELSEWHERE = 8
"""Of a machine that is not here, for advice: what servers with accelerators commonly have."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of the samples, in tokens, where they have been tokenised before."""

    longest: int
    mean: float


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run whose memory is planned. `total` is the device's memory (of the machine, for a CPU), 0 if nothing says it:
    neither the device nor, where it is not on this machine, `device_gb`."""

    models: Models
    device: DeviceSpec
    backend: EngineSpec
    dtype: torch.dtype
    loss_bytes: int
    total: int
    devices: int
    lengths: Lengths | None = None

    @property
    def on_host(self) -> bool:
        return self.device.device_type == "cpu"

    def need(self, config: RunConfig, ranks: Ranks) -> Need:
        """Memory of the rank that needs most."""
        return estimate(self.models, load_of(config, self, ranks.all))

    def available(self, config: RunConfig, ranks: Ranks) -> int | None:
        """Bytes that a rank may take: as given, else the device's, without an engine's part; ranks on one CPU share its
        memory. None: unknown."""
        if config.train.memory_gb is not None:
            return int(config.train.memory_gb * GB)
        if not self.total:
            return None
        share = int(self.total * trainer_fraction(config, self.device.device_type))
        return self.total // ranks.here if self.on_host else share


@dataclass(frozen=True, kw_only=True)
class _ShapesOnly:
    """A target head without values, to build a draft of shapes from."""

    embedding_VH: torch.Tensor
    head_VH: torch.Tensor

    @property
    def shard_VH(self) -> torch.Tensor:
        return self.head_VH

    @property
    def shards(self) -> VocabularyShards | None:
        return None

    def rows(self, ids_N: torch.Tensor) -> torch.Tensor:
        return self.head_VH[ids_N]

    def normed(self, last_TH: torch.Tensor, state: NormState) -> torch.Tensor:
        return last_TH

    def logits(self, normed_TH: torch.Tensor, rows_NH: torch.Tensor | None = None) -> torch.Tensor:
        return normed_TH @ (self.head_VH if rows_NH is None else rows_NH).T

    def finished(self, products: torch.Tensor) -> torch.Tensor:
        return products


def draft_of_shapes(algorithm: Algorithm, target: TargetSpec) -> nn.Module:
    """The draft without storage."""
    with torch.device("meta"):
        ends = torch.empty(target.vocab_size, target.hidden_size)
        vocabulary = VocabularyMap(ids_N=torch.arange(algorithm.vocabulary_size), target_size=target.vocab_size)
        return algorithm.build_draft(vocabulary, _ShapesOnly(embedding_VH=ends, head_VH=ends))


def subject_of(
    config: RunConfig,
    device: DeviceSpec,
    target: TargetSpec,
    weights: TargetWeights,
    algorithm: Algorithm,
    lengths: Lengths | None,
) -> Subject:
    """Of a checked configuration. Loads the device's adapter where it can be used here."""
    loaded: Device | None = device.load() if registry.probe(device).ok else None
    host = device.device_type == "cpu"
    dtype = running_dtype(config.target.dtype, target.dtype, torch.device(device.device_type))
    backend = registry.backends().spec(config.backend)
    inside = backend.available is None and config.pipeline.topology == "inprocess"
    draft = draft_of_shapes(algorithm, target)
    models = Models(
        algorithm=algorithm,
        spec=target,
        draft=tuple(tuple(p.shape) for p in draft.parameters() if p.requires_grad),
        fp8=_fp8_elements(draft, algorithm, target),
        target=tuple(weights.shape(name) for name in weights.files) if inside else (),
        mapped=host and dtype == target.dtype and target.quantisation is None,
        process=loaded.runtime.memory().allocated if host and loaded is not None else None,
        kept=_kept(weights) if inside else (),
    )
    return Subject(
        models=models,
        device=device,
        backend=backend,
        dtype=dtype,
        loss_bytes=loaded.ops.loss_bytes if loaded is not None else 1 << 30,
        total=loaded.runtime.memory().total if loaded is not None else int((config.device_gb or 0) * GB),
        devices=loaded.runtime.device_count() if loaded is not None else DEVICES_ELSEWHERE,
        lengths=lengths,
    )


def _kept(weights: TargetWeights) -> tuple[int, ...]:
    """Bytes of a target's tensors, if it is quantised in a form that nobody here dequantises."""
    if weights.quantisation is None or unread(weights.quantisation) is None:
        return ()
    return tuple(weights.stored[name].nbytes for name in weights.files)


def _fp8_elements(draft: nn.Module, algorithm: Algorithm, target: TargetSpec) -> int:
    """Of the weights that a run in FP8 makes ready; a draft without a head of its own has the target's rows."""
    inside, outside = fp8_weights(draft)
    matrices = dict(draft.named_parameters())
    head = torch.empty(algorithm.vocabulary_size, target.hidden_size, device="meta")
    own = any(matrices[name].shape == head.shape for name in (*inside, *outside))
    return sum(matrices[name].numel() for name in inside) + (head.numel() if not own and fits(head) else 0)


def cached_lengths(
    config: RunConfig, reader: RowReader, tokenizer: PreTrainedTokenizerBase | None
) -> torch.Tensor | None:
    """Tokens of every sample, if the data have been tokenised with these settings before."""
    if tokenizer is None:
        return None
    reading = DatasetSettings.of_training(config)
    entry = cache.entry_path(reading, cache.fingerprint(reader.files, tokenizer, reading, None))
    cached = cache.find(entry, None) if entry.exists() else None
    return None if cached is None else planned_lengths(cached.offsets, reading)


def lengths_of(lengths: torch.Tensor | None) -> Lengths | None:
    if lengths is None or not lengths.numel():
        return None
    return Lengths(longest=int(lengths.max()), mean=float(lengths.double().mean()))


def load_of(config: RunConfig, subject: Subject, ranks: int) -> Load:
    train, parallel, compute = config.train, config.parallel, COMPUTE[config.precision.compute]
    longest = (
        config.data.max_length if subject.lengths is None else min(subject.lengths.longest, config.data.max_length)
    )
    shared = parallel.ulysses * parallel.ring
    rows = row_tokens(config, ranks, longest)
    exchange, _ = choose_exchange(config, subject.models.algorithm, ranks, longest)
    form, _ = choose_logits(config)
    memory = step_memory(train, form)
    return Load(
        ranks=ranks,
        rows=rows,
        text=longest,
        captured=_captured(config, ranks, rows, longest),
        several=_several(config, subject, ranks, longest),
        compute=compute,
        fp8=config.precision.compute == "fp8",
        target_dtype=subject.dtype,
        memory=replace(memory, loss_bytes=memory.loss_bytes or subject.loss_bytes),
        exchange=exchange,
        held=_traffic(config, subject, rows, longest).held(exchange) if shared > 1 else 0,
        tensor_parallel=config.target.tensor_parallel,
        head_ranks=1 if form == "off" else logits_ranks(config, ranks),
        offload=train.offload,
        optimizer=train.optimizer,
    )


def least_held(config: RunConfig, subject: Subject, ranks: int) -> Callable[[str], int]:
    """Bytes held by an exchange, for choosing among those of `config`'s groups."""
    load = load_of(config, subject, ranks)
    traffic = _traffic(config, subject, load.rows, load.text)
    return traffic.held  # type: ignore[return-value]


def _traffic(config: RunConfig, subject: Subject, rows: int, text: int) -> Traffic:
    shape = subject.models.algorithm.attention_shape
    return Traffic(
        rows=rows,
        queries=shape.queries(rows, text),
        itemsize=COMPUTE[config.precision.compute].itemsize,
        shape=shape,
        ulysses=config.parallel.ulysses,
        ring=config.parallel.ring,
    )


def _captured(config: RunConfig, ranks: int, rows: int, longest: int) -> int:
    """Ranks that share sequences divide the documents, not their tokens: each runs whole ones through the target."""
    shared = config.parallel.ulysses * config.parallel.ring
    if shared == 1:
        return rows
    if config.target.tensor_parallel > 1:
        return rows * shared
    if config.train.tokens_per_rank is not None:
        return max(rows, min(longest, rows * shared))
    documents = rows // -(-longest // shared)
    return ceil(documents / shared) * longest


def _several(config: RunConfig, subject: Subject, ranks: int, longest: int) -> bool:
    """Whether a step has more than one micro-batch; of packed rows, judged by the mean length."""
    train, data = config.train, max(1, ranks // (config.parallel.ulysses * config.parallel.ring))
    if train.tokens_per_rank is None:
        return train.batch_size > train.micro_batch_size * data
    mean = longest if subject.lengths is None else min(subject.lengths.mean, longest)
    return train.batch_size * mean > train.tokens_per_rank * ranks
