"""What a step on blocks keeps: the estimate against the peak, and nothing from one step to the next."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Moment, StepMemory

TOKENS = 700


def alive_bytes() -> int:
    gc.collect()
    return sum(found.untyped_storage().nbytes() for found in gc.get_objects() if issubclass(type(found), Tensor))


def given(world: Any, tokens: int = TOKENS) -> FeatureRows:
    return FeatureRows.of([world.features(world.tokens(tokens))], [torch.ones(tokens, dtype=torch.bool)])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"num_anchors": TOKENS}, {"num_anchors": 100}, {"num_anchors": 100, "weighting": "dpace"}],
    ids=["everywhere", "some", "dpace"],
)
def test_the_estimate_is_near_the_peak(
    make_world: Callable[..., Any],
    peak_bytes: Callable[[Callable[[], object]], int],
    recompute: bool,
    options: dict[str, Any],
) -> None:
    ids_N = torch.arange(0, 300, 10)
    world = make_world(dtype=torch.float32, ids_N=ids_N, block_size=6, num_layers=3, **options)
    rows = given(world)

    def run() -> None:
        memory = StepMemory(recompute=recompute, loss_bytes=1)
        world.step(rows, Moment(draws=(1,)), memory).numerator.backward()

    run()
    world.draft.zero_grad()
    gradients = sum(4 * parameter.numel() for parameter in world.draft.parameters())
    estimate = 4 * TOKENS * world.algorithm.kept_values(recompute=recompute, text=TOKENS)
    assert estimate == pytest.approx(peak_bytes(run) - gradients, rel=0.2)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_leaves_nothing_behind(make_world: Callable[..., Any], recompute: bool) -> None:
    world = make_world(weighting="dpace", num_anchors=20)
    rows, alive = given(world, 60), []
    for _ in range(4):
        world.gradients([rows], [Moment(draws=(1,))], StepMemory(recompute=recompute))
        alive.append(alive_bytes())
    assert alive[1] == alive[2] == alive[3]


@pytest.mark.parametrize("from_anchor", [False, True])
def test_what_is_said_of_its_attention_and_loss_is_what_runs(make_world: Callable[..., Any], from_anchor: bool) -> None:
    """Queries are slots of the anchors that a text may have; a target row teaches a pair of each step at most."""
    tokens = 60
    world = make_world(num_anchors=7, block_size=4, layer_types=("full", "full"), sample_from_anchor=from_anchor)
    batch, algorithm = world.batch(given(world, tokens), Moment(draws=(1,))), world.algorithm
    shape = algorithm.attention_shape
    assert (shape.steps, shape.layers) == (1, 2)
    assert batch.inputs.tokens_BQ.numel() == shape.queries(tokens, tokens) == 7 * 4
    assert shape.queries(5, 5) == 5 * 4
    assert len(batch.pairs.sizes) == algorithm.loss_steps == (4 if from_anchor else 3)
