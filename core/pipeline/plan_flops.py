"""Floating-point operations of a draft's training step, counted while the algorithm's own step runs without numbers.

What a pass multiplies depends on sizes, lengths and masks alone, so the same count serves a draft of any size on any
machine, and algorithms from plug-ins. A multiplication and an addition are two operations; elementwise work is none.

Shape letters: T tokens, N taps, H target hidden size, V target vocabulary; B, Q, S, D as in `interfaces.device`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchspec.core import registry
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Algorithm, Moment, StepMemory, TrainingSample
from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.distillation import TilePairs, TileTeacher, TileTerms
from torchspec.core.pipeline.draft_shapes import ShapesOfEnds, draft_of_shapes
from torchspec.core.pipeline.shapes_only import ShapesOnly
from torchspec.core.training.random_state import draw_of

WHOLE = 1 << 50
"""Bytes: nothing is cut into pieces, for pieces multiply the same."""
FORWARD, BACKWARD = 4, 10
"""Of attention, for each query, key that it sees, and value of a head: two products forward; backward those again of
queries and keys, and four more (2205.14135)."""


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Of one sample's forward and backward pass: matrix products, attention over the keys that masks let in, and how
    many operators PyTorch is asked for, however many samples a micro-batch has."""

    products: float
    attention: float
    operators: float

    @property
    def all(self) -> float:
        return self.products + self.attention


class _CountedAttention:
    """Implements `Attention`: what comes out has shapes alone."""

    temporary_bytes = WHOLE

    def __init__(self) -> None:
        self.flops = 0.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> tuple[Tensor, Tensor]:
        batch, queries, heads, _ = q.shape
        self.flops += FORWARD * _pairs(q, k, mask) * heads * q.shape[-1]
        return torch.empty_like(q), q.new_empty(batch, heads, queries, dtype=torch.float32)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: MaskSpec, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.flops += BACKWARD * _pairs(q, k, mask) * q.shape[2] * q.shape[-1]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _pairs(q: Tensor, k: Tensor, mask: MaskSpec) -> int:
    """Queries times the keys that each sees, over all rows of the batch."""
    batch, queries, keys = len(q), q.shape[1], k.shape[1]
    if mask.kind == "dense":
        assert mask.keep_BQS is not None
        seen = mask.keep_BQS.sum()
        rows = len(mask.keep_BQS)
    else:
        start_BQ, end_BQ = mask.bounds(queries, keys, torch.device("cpu"))
        seen = (end_BQ - start_BQ).clamp_min(0).sum()
        rows = len(start_BQ)
    return int(seen) * batch // rows


class _CountedOps(FusedOps):
    """Elementwise pieces that cut nothing, and a loss whose terms nobody asks for."""

    temporary_bytes = WHOLE
    loss_bytes = WHOLE

    def distillation_tile(
        self, logits_CN: Tensor, teacher: TileTeacher, pairs: TilePairs, *, with_grad: bool
    ) -> TileTerms:
        count = len(logits_CN)
        names = {"cross_entropy", *pairs.weight, *pairs.labels}
        value = {name: logits_CN.new_empty(count) for name in names}
        best_C = torch.zeros(count, dtype=torch.int64)
        return TileTerms(value=value, alpha_C=logits_CN.new_empty(count), best_C=best_C)


def step_flops(
    algorithm: Algorithm,
    spec: TargetSpec,
    samples: Sequence[TrainingSample],
    *,
    seed: int = 0,
    recompute: bool = False,
) -> StepFlops:
    """Of each sample as a micro-batch of its own, on average over them.

    The target's own pass is not in it; the logits that it teaches with are.
    """
    device = replace(registry.load_device("cpu"), attention=(attention := _CountedAttention()), ops=_CountedOps())
    memory = StepMemory(recompute=recompute, loss_bytes=WHOLE)
    draft = draft_of_shapes(algorithm, spec)
    with ShapesOnly() as shapes, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layouts that such tensors do not have
        head = ShapesOfEnds.of(spec)
        draft._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor)  # type: ignore[no-untyped-call]
        before = shapes.operators
        products = 0
        for sample in samples:
            with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
                moment = Moment(draws=(draw_of(seed, 0, sample.sample_id),))
                result = algorithm.step(draft, head, _rows(algorithm, spec, sample), device, memory, moment)
                torch.autograd.backward(result.numerator)
            products += counter.get_total_flops()
        operators = shapes.operators - before
    count = len(samples)
    return StepFlops(products=products / count, attention=attention.flops / count, operators=operators / count)


def _rows(algorithm: Algorithm, spec: TargetSpec, sample: TrainingSample) -> FeatureRows:
    length = sample.input_ids_T.numel()
    features = Features(
        input_ids_T=sample.input_ids_T,
        taps_TNH=torch.zeros(length, len(algorithm.taps), spec.hidden_size),
        last_TH=torch.zeros(length, spec.hidden_size),
        tap_layers=algorithm.taps,
        norm_state="post_norm",
    )
    return FeatureRows.of([features], [sample.loss_mask_T])


def _addmm(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


_IN_PLACE = {torch.ops.aten.addmm_: _addmm}
"""What PyTorch's counter does not know."""
