"""From a configuration to what decides a rank's memory: `plan_memory.estimate` of any variant of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from torchspec.core import registry
from torchspec.core.attention.volume import Traffic
from torchspec.core.config.accelerators import accelerators
from torchspec.core.config.schema import RunConfig
from torchspec.core.data import cache
from torchspec.core.data.dataset import DatasetSettings, planned_lengths
from torchspec.core.data.rows import RowReader
from torchspec.core.data.token_file import TokenData
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.device import Device, DeviceSpec
from torchspec.core.interfaces.engine import EngineSpec, TargetSpec
from torchspec.core.models.target_quantisation import unread
from torchspec.core.models.target_spec import running_dtype
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.ops.fp8 import fits
from torchspec.core.pipeline.assembly import step_memory
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.draft_shapes import draft_of_shapes
from torchspec.core.pipeline.parallel_fit import COMPUTE, choose_exchange, choose_logits, logits_ranks, row_tokens
from torchspec.core.pipeline.plan_memory import Need, estimate
from torchspec.core.pipeline.plan_terms import Load, Models
from torchspec.core.pipeline.topology_fit import trainer_fraction
from torchspec.core.training.fp8 import Gathering, fp8_weights, gathering_of

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
    neither the device nor, where it is not on this machine, `device_gb` or `device_name`."""

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
    gathered = {
        in_parts: _elements(draft, Gathering(scaling="row", head_in_parts=in_parts).weights(draft))
        for in_parts in (False, True)
    }
    models = Models(
        algorithm=algorithm,
        spec=target,
        draft=tuple(tuple(p.shape) for p in draft.parameters() if p.requires_grad),
        fp8=_fp8_elements(draft, algorithm, target),
        fp8_gathered=gathered[False],
        fp8_head=gathered[False] - gathered[True],
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
        total=loaded.runtime.memory().total if loaded is not None else int(_said_memory(config) * GB),
        devices=loaded.runtime.device_count() if loaded is not None else DEVICES_ELSEWHERE,
        lengths=lengths,
    )


def _said_memory(config: RunConfig) -> float:
    """Of a device that is not here, in 1e9 bytes; 0: nothing says it."""
    if config.device_gb is not None:
        return config.device_gb
    return accelerators()[config.device_name].memory if config.device_name else 0.0


def _kept(weights: TargetWeights) -> tuple[int, ...]:
    """Bytes of a target's tensors, if it is quantised in a form that nobody here dequantises."""
    if weights.quantisation is None or unread(weights.quantisation) is None:
        return ()
    return tuple(weights.stored[name].nbytes for name in weights.files)


def _elements(draft: nn.Module, names: Sequence[str]) -> int:
    return sum(parameter.numel() for name, parameter in draft.named_parameters() if name in names)


def _fp8_elements(draft: nn.Module, algorithm: Algorithm, target: TargetSpec) -> int:
    """Of the weights that a run in FP8 makes ready; a draft without a head of its own has the target's rows."""
    inside, outside = fp8_weights(draft)
    matrices = dict(draft.named_parameters())
    head = torch.empty(algorithm.vocabulary_size, target.hidden_size, device="meta")
    own = any(matrices[name].shape == head.shape for name in (*inside, *outside))
    return _elements(draft, inside) + (head.numel() if not own and fits(head) else 0)


def cached_tokens(
    config: RunConfig, reader: RowReader, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[TokenData, torch.Tensor] | None:
    """The data and the tokens of every sample, if they have been tokenised with these settings before."""
    if tokenizer is None:
        return None
    reading = DatasetSettings.of_training(config)
    entry = cache.entry_path(reading, cache.fingerprint(reader.files, tokenizer, reading, None))
    cached = cache.find(entry, None) if entry.exists() else None
    return None if cached is None else (cached, planned_lengths(cached.offsets, reading))


def cached_lengths(
    config: RunConfig, reader: RowReader, tokenizer: PreTrainedTokenizerBase | None
) -> torch.Tensor | None:
    """Tokens of every sample, if the data have been tokenised with these settings before."""
    cached = cached_tokens(config, reader, tokenizer)
    return None if cached is None else cached[1]


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
        fp8_gather=gathering_of(config.precision, ranks) is not None,
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
