"""Packed, in rows of their own or one by one: the same elements, the same sums, the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.algorithms.peagle.batch import Plan, build_batch
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Moment, StepResult

Worlds = Callable[..., Any]
LENGTHS = (31, 4, 18, 2, 25)
PACKS = [[2, 0], [4, 1, 3]]


def documents(world: Any) -> tuple[list[Any], list[Tensor]]:
    features = [world.features(world.tokens(length, n), n) for n, length in enumerate(LENGTHS)]
    masks = [torch.arange(length) % 11 > 2 for length in LENGTHS]
    return features, masks


def gradients(world: Any, results: Sequence[StepResult]) -> dict[str, Tensor]:
    world.draft.zero_grad()
    for result in results:
        result.numerator.backward()
    return {name: parameter.grad.clone() for name, parameter in world.draft.named_parameters()}


@pytest.mark.parametrize("ratio", [0.7, 1.0])
def test_packed_rows_are_separate_documents(make_world: Worlds, ratio: float) -> None:
    world = make_world(num_layers=2, depths=4, ids_N=torch.arange(0, 300, 2), depth_ratio=ratio)
    features, masks = documents(world)
    draws = tuple(range(40, 40 + len(LENGTHS)))
    together = world.step(features, masks, moment=Moment(draws=draws))
    packed = world.step(features, masks, moment=Moment(draws=draws), packs=PACKS)
    alone = [
        world.step([one], [mask], moment=Moment(draws=(draw,)))
        for one, mask, draw in zip(features, masks, draws, strict=True)
    ]
    expected = gradients(world, alone)
    for result in (together, packed):
        for name, value in result.sums.items():
            torch.testing.assert_close(value, sum(one.sums[name] for one in alone), rtol=1e-12, atol=0, msg=name)
        for name, grad in gradients(world, [result]).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_other_draws_teach_other_elements(make_world: Worlds) -> None:
    world = make_world(num_layers=1, depths=4)
    features, masks = documents(world)
    losses = {float(world.step(features, masks, moment=Moment(draws=(n,) * 5)).numerator.detach()) for n in range(3)}
    assert len(losses) == 3


def test_a_depth_takes_the_rows_that_it_needs_and_no_more(make_world: Worlds) -> None:
    world = make_world(num_layers=1, depths=5)
    length = 400
    features, masks = [world.features(world.tokens(length))], [torch.ones(length, dtype=torch.bool)]
    plan = Plan(sampling=world.algorithm.sampling, chunk_rows=64, device=torch.device("cpu"))
    batch = build_batch(FeatureRows.of(features, masks), plan, Moment(draws=(9,)))
    counts = [turn_BQ.shape[1] for turn_BQ in batch.inputs.turns]
    valid = length - 2
    assert counts == [length, *(int((valid - j) * max(0.7**j, 0.2)) for j in range(1, 5))]
    assert batch.pairs.sizes == (valid, *counts[1:])


def test_texts_without_supervision_use_every_parameter(make_world: Worlds) -> None:
    world = make_world(num_layers=2, depths=4)
    features, masks = documents(world)
    result = world.step(features, [torch.zeros_like(mask) for mask in masks])
    assert float(result.numerator.detach()) == float(result.denominator) == 0.0
    assert not any(grad.any() for grad in gradients(world, [result]).values())
    figures = world.algorithm.summarise(result.sums)
    assert figures["simulated_acceptance_length"] != figures["simulated_acceptance_length"]


def test_a_walk_is_known_only_where_every_element_was_kept(make_world: Worlds) -> None:
    drawn, kept = (make_world(num_layers=1, depths=3, depth_ratio=ratio) for ratio in (0.7, 1.0))
    features, masks = documents(drawn)
    some, every = (world.step(features, masks, moment=Moment(draws=(1, 2, 3, 4, 5))).sums for world in (drawn, kept))
    assert int(every["walk_rounds"]) > 3
    assert int(some["walk_rounds"]) == 0
    assert 0 < int(some["whole_slots"]) < int(every["whole_slots"])
    assert kept.algorithm.summarise(every)["simulated_acceptance_length"] >= 1.0
    length = drawn.algorithm.summarise(some)["simulated_acceptance_length"]
    assert length != length
