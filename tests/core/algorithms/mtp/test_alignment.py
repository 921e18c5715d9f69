"""Nothing about batching changes what a head learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.features.rows import FeatureRows, TokenRows
from torchspec.core.interfaces.algorithm import StepResult
from torchspec.core.interfaces.target import VocabularyMap

Worlds = Callable[..., Any]
CASES = (("mimo", "qwen2"), ("deepseek", "llama"), ("qwen", "qwen3"))


def gradients(world: Any, results: list[StepResult]) -> dict[str, Tensor]:
    """Of the sums of several micro-batches, divided once."""
    world.draft.zero_grad(set_to_none=True)
    numerator = sum((r.numerator for r in results), torch.zeros(()))
    (numerator / sum(float(r.denominator) for r in results)).backward()
    return {name: p.grad.clone() for name, p in world.draft.named_parameters()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], limit: float = 1e-12) -> None:
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= limit * gradient.norm(), name


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_packed_documents_teach_what_they_teach_alone(make_world: Worlds, family: str, kind: str) -> None:
    """Each has its own position 0 there, too, whose embedding two of the families hide."""
    world = make_world(family, kind)
    lengths = (13, 4, 9, 1)
    features = [world.features(world.tokens(n, n), n, "post_norm") for n in lengths]
    masks = [torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.7 for n in lengths]
    apart = [world.step([f], [m]) for f, m in zip(features, masks, strict=True)]
    whole = replace(
        features[0],
        input_ids_T=torch.cat([f.input_ids_T for f in features]),
        taps_TNH=torch.cat([f.taps_TNH for f in features]),
        last_TH=torch.cat([f.last_TH for f in features]),
    )
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = TokenRows(
        input_ids_BT=whole.input_ids_T[None], loss_mask_BT=torch.cat(masks)[None], document_BT=numbers[None]
    )
    packed = world.algorithm.run(world.draft, world.head, world.assembled(rows, [whole]), world.device)
    together = world.step(features, masks)
    wanted = gradients(world, apart)
    assert_same(gradients(world, [packed]), wanted)
    assert_same(gradients(world, [together]), wanted)
    for name in ("supervised", "correct", "walk_hits", "tokens"):
        assert torch.equal(packed.sums[name], sum(r.sums[name] for r in apart)), name


@pytest.mark.parametrize("objective", [{"ground_truth": 1.0}, {"ground_truth": 0.5, "kl": 1.0}, {"lk_lambda": 1.0}])
def test_without_supervision_every_gradient_is_a_finite_zero(make_world: Worlds, objective: dict[str, float]) -> None:
    world = make_world("mimo", "qwen2", dtype=torch.float32, objective=objective)
    features = [world.features(world.tokens(n, n), n) for n in (9, 1)]
    result = world.step(features, [torch.zeros(n, dtype=torch.bool) for n in (9, 1)])
    assert float(result.denominator) == result.numerator.item() == 0.0
    result.numerator.backward()
    for name, parameter in world.draft.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_terms_are_weighed_as_the_options_say(make_world: Worlds) -> None:
    """The text's cross-entropy and the target's: their sum is both together."""
    sums = {}
    for name, objective in (
        ("text", {"ground_truth": 1.0}),
        ("target", {"cross_entropy": 1.0}),
        ("both", {"ground_truth": 1.0, "cross_entropy": 2.0}),
    ):
        world = make_world("mimo", "qwen2", objective=objective)
        sums[name] = world.step([world.features(world.tokens(20))], [torch.ones(20, dtype=torch.bool)]).numerator.item()
    assert sums["both"] == pytest.approx(sums["text"] + 2 * sums["target"], rel=1e-12)
    assert abs(sums["text"] - sums["target"]) > 0.1


def test_the_targets_head_and_embedding_stay_as_they_are(make_world: Worlds) -> None:
    """They get no gradient, and the draft's own state holds neither."""
    world = make_world("deepseek", "llama")
    result = world.step([world.features(world.tokens(20))], [torch.ones(20, dtype=torch.bool)])
    result.numerator.backward()
    assert not world.head.head_VH.requires_grad
    assert world.head.head_VH.grad is world.head.embedding_VH.grad is None
    assert all(120 not in tensor.shape for tensor in world.draft.state_dict().values())


def test_the_head_is_copied_for_another_precision_once(make_world: Worlds) -> None:
    world = make_world("mimo", "qwen2", dtype=torch.float32)
    draft = world.draft.double()
    made = [draft.target_rows.rows(world.head, draft.vocabulary, torch.float64, "tokens")[0] for _ in range(2)]
    assert made[0] is made[1]
    assert made[0].dtype == torch.float64
    own, _ = draft.target_rows.rows(world.head, draft.vocabulary, torch.float32, "tokens")
    assert own.data_ptr() == world.head.head_VH.data_ptr()


def test_a_pruned_vocabulary_is_refused(make_world: Worlds) -> None:
    world = make_world("mimo", "qwen2")
    pruned = VocabularyMap(ids_N=torch.arange(50), target_size=120)
    with pytest.raises(Exception, match="all 120 tokens"):
        world.algorithm.build_draft(pruned, world.head)


def test_rows_of_features_are_those_of_the_last_layer(make_world: Worlds) -> None:
    world = make_world("mimo", "qwen2")
    assert world.algorithm.taps == (2,)
    assert world.algorithm.halo == 3
    rows = FeatureRows.of([world.features(world.tokens(6))], [torch.ones(6, dtype=torch.bool)])
    assert rows.taps_BSF.shape == (1, 6, 32)
