"""What a run is to do, counted from its data as far as they are known: tokens, steps, operations, bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from torchspec.core import registry, settings
from torchspec.core.config.schema import RunConfig
from torchspec.core.interfaces.algorithm import Algorithm
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_outline import stored_bytes
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.plan_flops import step_flops
from torchspec.core.pipeline.plan_load import Subject, load_of
from torchspec.core.pipeline.plan_rates import Products, Rates, rates_of
from torchspec.core.pipeline.plan_target import NOT_PASSED, target_cost
from torchspec.core.pipeline.plan_texts import Texts, representative
from torchspec.core.pipeline.plan_time import TimePlan, Work, time_plan
from torchspec.core.pipeline.topology_fit import engines_in_all

LAYER_OPERATORS = 20
"""Of a decoder layer's forward pass: products, norms, rotations, attention, and what stands between them."""
SHAPES = 6
"""Of weights, by the operations that they take, whose products are measured."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What of a checked run its time depends on. `done` steps of `steps` are behind it, in all `per_epoch` a pass."""

    config: RunConfig
    subject: Subject
    weights: TargetWeights
    ranks: Ranks
    per_epoch: int
    steps: int
    done: int = 0

    @property
    def algorithm(self) -> Algorithm:
        return self.subject.models.algorithm

    @property
    def target(self) -> TargetSpec:
        return self.subject.models.spec


def plan_time(planned: Planned, texts: Texts | None) -> TimePlan:
    """The time of a run, or what is missing to say it."""
    config, subject = planned.config, planned.subject
    missing = []
    if texts is None:
        missing.append("none of the rows that were looked at can be used")
    if config.on_policy.enabled:
        missing.append("the target writes the answers during the run, and how fast it does so is not planned")
    work = None
    if texts is not None:
        try:
            work = work_of(planned, texts)
        except Exception as error:  # an algorithm from a plug-in may want numbers, and this is a plan  # noqa: BLE001
            missing.append(f"the steps of {planned.algorithm.name} cannot be counted: {type(error).__name__}: {error}")
    rates = None if work is None or missing else _rates(planned)
    if rates is None and not missing:
        missing.append(_unknown_rates(config))
    notes = ["not counted: loading, tokenising, validation, writing checkpoints, communication, waiting for engines"]
    notes += [] if subject.on_host else ["no accelerator has been measured against this estimate (docs/sizing.md)"]
    return time_plan(config, work, rates, on_host=subject.on_host, missing=missing, notes=notes)


def _unknown_rates(config: RunConfig) -> str:
    if config.device_name is not None:
        return f"device_name={config.device_name} has no figure for precision.compute=float32: give device_tflops=N"
    return "nothing says how fast the device is: give device_name (h100, ...), or device_tflops=N for N TFLOP/s"


def work_of(planned: Planned, texts: Texts) -> Work:
    """Counted from samples of the texts."""
    config, subject, target = planned.config, planned.subject, planned.target
    chosen = representative(texts.samples)
    length = sum(sample.input_ids_T.numel() for sample in chosen) / len(chosen)
    draft = step_flops(planned.algorithm, target, chosen, seed=config.seed, recompute=config.train.recompute)
    cost = target_cost(target, planned.weights)
    passed = sum(cost.flops(sample.input_ids_T.numel()) for sample in chosen) / len(chosen)
    itemsize = subject.dtype.itemsize
    left = (planned.steps - planned.done) / planned.per_epoch
    return Work(
        tokens=texts.tokens * left,
        epoch_tokens=texts.tokens,
        epochs=left,
        steps=planned.steps - planned.done,
        counted=texts.counted,
        draft=(draft.products + draft.attention) / length,
        target=passed / length,
        passes=(planned.steps - planned.done) * _passes(config, planned.ranks, texts),
        draft_operators=draft.operators,
        target_operators=LAYER_OPERATORS * target.num_layers,
        parameters=subject.models.trained,
        feature_bytes=(len(planned.algorithm.taps) + 1) * target.hidden_size * itemsize,
        target_bytes=stored_bytes(planned.weights, itemsize),
        ranks=planned.ranks.all,
        engine_devices=_engine_devices(config, planned.ranks),
    )


def _passes(config: RunConfig, ranks: Ranks, texts: Texts) -> int:
    """Micro-batches of a rank in a step."""
    train, shared = config.train, config.parallel.ulysses * config.parallel.ring
    if train.tokens_per_rank is not None:
        mean = sum(sample.input_ids_T.numel() for sample in texts.samples) / len(texts.samples)
        return max(1, math.ceil(train.batch_size * mean / (train.tokens_per_rank * ranks.all)))
    groups = max(1, ranks.all // shared)
    return max(1, math.ceil(train.batch_size / groups / train.micro_batch_size))


def _engine_devices(config: RunConfig, ranks: Ranks) -> int:
    """On which the target runs; of features captured before, as many as train."""
    if config.pipeline.topology == "disaggregated":
        return engines_in_all(config) * config.engine.tensor_parallel
    return ranks.all


def _rates(planned: Planned) -> Rates | None:
    config, subject, target = planned.config, planned.subject, planned.target
    here = subject.device.load() if registry.probe(subject.device).ok else None
    load = load_of(config, subject, planned.ranks.all)
    names = [name for name in planned.weights.files if not NOT_PASSED.search(name)]
    products = Products(
        rows=load.rows,
        draft=_largest(subject.models.draft),
        target=_largest([planned.weights.shape(name)[-2:] for name in names]),
        draft_dtype=load.compute,
        target_dtype=subject.dtype,
    )
    quantised = str((target.quantisation or {}).get("quant_method", ""))
    cores = min(settings.cores(), torch.get_num_threads() * planned.ranks.here)
    return rates_of(config, here, products, cores=cores, target_fp8="fp8" in quantised)


def _largest(shapes: Iterable[tuple[int, ...]]) -> tuple[tuple[int, int], ...]:
    """Of matrices those that most operations go into, each as often as it is there."""
    counts: dict[tuple[int, int], int] = {}
    for shape in shapes:
        if len(shape) == 2:
            counts[shape[0], shape[1]] = counts.get((shape[0], shape[1]), 0) + 1
    most = sorted(counts, key=lambda shape: -counts[shape] * math.prod(shape))[:SHAPES]
    return tuple(shape for shape in most for _ in range(counts[shape]))
