"""The formulas of a rank's memory against what autograd keeps, and how they answer to what they are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspec.core import registry
from torchspec.core.algorithms.eagle3 import SPEC
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import StepMemory
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline.draft_shapes import draft_of_shapes
from torchspec.core.pipeline.plan_memory import KEPT, Need, estimate
from torchspec.core.pipeline.plan_parts import micro_batch_parts, target_parts
from torchspec.core.pipeline.plan_terms import LARGE_BLOCK, MOMENTS, Load, Models

LOAD = Load(
    text=4096,
    ranks=1,
    rows=2048,
    captured=2048,
    several=False,
    compute=torch.float32,
    target_dtype=torch.float32,
    memory=StepMemory(loss_bytes=1 << 20),
)


@pytest.fixture(scope="module")
def accelerated(tiny_llama: Path) -> Models:
    """A draft for the tiny Llama, whose head is its own, on a device whose allocator counts."""
    target = read_target_spec(tiny_llama)
    algorithm = SPEC.create(SPEC.options(unroll=3, vocab_size=100), target)
    weights = TargetWeights.open(tiny_llama)
    return Models(
        algorithm=algorithm,
        spec=target,
        draft=tuple(tuple(p.shape) for p in draft_of_shapes(algorithm, target).parameters()),
        target=tuple(weights.shape(name) for name in weights.files),
        mapped=False,
        process=None,
    )


@pytest.fixture(scope="module")
def hosted(accelerated: Models) -> Models:
    """The same on a CPU."""
    return replace(accelerated, mapped=True, process=400_000_000)


def parts(need: Need) -> dict[str, int]:
    return {part.name: part.bytes for part in need.parts}


@pytest.mark.parametrize("unroll", [2, 5])
def test_the_values_kept_for_the_backward_pass_are_those_that_autograd_keeps(tiny_target: Path, unroll: int) -> None:
    """Parameters, features and the head's gradient are other parts. What recomputing keeps autograd does not see."""
    target = read_target_spec(tiny_target)
    algorithm = SPEC.create(SPEC.options(unroll=unroll, vocab_size=100), target)
    head = load_target_head(tiny_target, dtype=torch.float32, device=torch.device("cpu"))
    draft = algorithm.build_draft(VocabularyMap(ids_N=torch.arange(100), target_size=300), head)
    tokens = 400
    features = Features(
        input_ids_T=torch.randint(0, 300, (tokens,)),
        taps_TNH=torch.randn(tokens, 3, 64),
        last_TH=torch.randn(tokens, 64),
        tap_layers=algorithm.taps,
        norm_state="post_norm",
    )
    others = [*draft.parameters(), head.embedding_VH, features.taps_TNH]
    known = {tensor.untyped_storage().data_ptr() for tensor in others}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.shape != (100, 64):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rows = FeatureRows.of([features], [torch.ones(tokens, dtype=torch.bool)])
        result = algorithm.step(draft, head, rows, registry.load_device("cpu"))
    assert result.numerator.requires_grad
    values = algorithm.kept_values(recompute=False, moment="loss")
    assert 4 * tokens * values == pytest.approx(sum(kept.values()), rel=0.06)
    assert algorithm.kept_values(recompute=False) > values


@pytest.mark.parametrize("field", ["rows", "captured", "held"])
def test_more_of_anything_needs_more(accelerated: Models, field: str) -> None:
    needs = [estimate(accelerated, replace(LOAD, **{field: count})).moments for count in (128, 1000, 5000, 20000)]
    moment = "capture" if field == "captured" else "backward"
    sums = [need[moment] for need in needs]
    assert sums == sorted(set(sums))


def test_a_greater_budget_of_the_loss_is_used_as_far_as_there_are_rows(accelerated: Models) -> None:
    budgets = (1, 4_000_000, 8_000_000, 1 << 40, 1 << 41)
    sums = [
        estimate(accelerated, replace(LOAD, memory=StepMemory(loss_bytes=budget))).moments["loss"] for budget in budgets
    ]
    assert sums[0] < sums[1] < sums[2] < sums[3]
    assert sums[3] == sums[4]
    assert sums[2] - sums[0] <= 8_000_000


def test_what_is_sharded_is_divided_by_the_ranks(accelerated: Models) -> None:
    one, four = (parts(estimate(accelerated, replace(LOAD, ranks=ranks))) for ranks in (1, 4))
    for name in ("draft parameters", "optimizer state"):
        assert four[name] == pytest.approx(one[name] / 4, rel=0.01)
    assert four["gathered parameters"] == one["gathered parameters"] == 4 * accelerated.trained


def test_moments_in_8_bits(accelerated: Models) -> None:
    """A byte for a value and 4 for 256 of them, and the map's 1024; 8 bytes for both of them where they stay fp32."""
    plain, eight = (parts(estimate(accelerated, replace(LOAD, optimizer=name))) for name in ("adamw", "adamw8bit"))
    assert plain["optimizer state"] == 8 * accelerated.trained
    expected = 0
    for shape in accelerated.draft:
        values = torch.Size(shape).numel()
        fits = values >= 4096 and values % 256 == 0
        expected += 2 * (values + values // 64 + 1024) if fits else 8 * values
    assert eight["optimizer state"] == expected < plain["optimizer state"] / 3
    del plain["optimizer state"], eight["optimizer state"]
    assert eight == plain


def test_a_target_that_ranks_hold_together_is_divided(accelerated: Models, hosted: Models) -> None:
    split = replace(LOAD, ranks=2, tensor_parallel=2, head_ranks=2)
    for models in (accelerated, hosted):
        elements = sum(torch.Size(shape).numel() for shape in models.target)
        end = 4 * 300 * 64
        found = parts(estimate(models, split))
        assert found["target model"] == pytest.approx(4 * elements / 2, rel=0.01)
        assert found["target embedding and head"] == end + end // 2


def test_a_cpu_reads_the_pages_of_a_target_in_its_own_precision_but_not_its_head(
    accelerated: Models, hosted: Models
) -> None:
    whole, pages = (parts(estimate(models, LOAD))["target model"] for models in (accelerated, hosted))
    assert whole - pages == 4 * 300 * 64


def test_the_process_counts_on_a_cpu_alone(accelerated: Models, hosted: Models) -> None:
    assert not {"process", KEPT, "gaps in the heap"} & parts(estimate(accelerated, LOAD)).keys()
    assert parts(estimate(hosted, LOAD))["process"] > 400_000_000


def test_small_blocks_stay_and_large_ones_do_not(hosted: Models) -> None:
    """With small blocks a moment after the backward pass costs as much; with large ones it does not."""
    small = estimate(hosted, LOAD)
    assert small.moments["optimizer"] == pytest.approx(small.bytes, rel=0.01)
    rows = LARGE_BLOCK // (4 * 16) + 1  # the narrowest activation, a key of 2 heads of 16, is large then
    large = estimate(hosted, replace(LOAD, rows=rows))
    activations = parts(large)["activations"]
    assert large.bytes - large.moments["optimizer"] > activations


def test_the_peak_is_the_sum_of_its_parts(hosted: Models, accelerated: Models) -> None:
    for models in (hosted, accelerated):
        for rows in (10, 2048, 100_000):
            need = estimate(models, replace(LOAD, rows=rows, captured=rows))
            assert need.bytes == sum(part.bytes for part in need.parts)
            assert need.bytes >= 0.99 * max(need.moments.values())
            assert set(need.moments) == set(MOMENTS)


@pytest.mark.parametrize(
    ("change", "moment"),
    [
        ({"rows": 16, "captured": 200_000}, "capture"),
        ({"memory": StepMemory(loss_bytes=1 << 40)}, "loss"),
        ({}, "backward"),
        ({"rows": 8, "captured": 8}, "reduction"),
    ],
)
def test_every_moment_can_be_the_peak(accelerated: Models, change: dict[str, Any], moment: str) -> None:
    assert estimate(accelerated, replace(LOAD, **change)).moment == moment


def test_offloading_leaves_an_accelerator_less(accelerated: Models) -> None:
    none, states, activations, everything = (
        estimate(accelerated, replace(LOAD, offload=what)).bytes for what in ("none", "states", "activations", "all")
    )
    assert everything < states < none
    assert everything < activations < none


def test_a_target_in_another_process_takes_no_memory_here(accelerated: Models) -> None:
    """What remains of it are the trainer's own ends, and records on their way: of a pass, and of the next one."""

    def sizes(models: Models) -> dict[str, int]:
        return {part.name: part.bytes for part in (*target_parts(models, LOAD), *micro_batch_parts(models, LOAD))}

    inside, outside = sizes(accelerated), sizes(replace(accelerated, target=()))
    assert inside.keys() - outside.keys() == {"target model", "target's forward pass"}
    assert outside.keys() - inside.keys() == {"records of the engine", "features of the next pass"}
    assert outside["records of the engine"] == outside["features"] == outside["features of the next pass"]
    host = sizes(replace(accelerated, target=(), process=1 << 29))
    assert "features of the next pass" not in host, "the host has them where they are used"
    assert outside["target embedding and head"] == inside["target embedding and head"]


def test_a_target_that_stays_quantised_takes_the_bytes_of_its_files(accelerated: Models) -> None:
    """Its embedding and head are the trainer's, in the precision that it runs in."""
    plain = {part.name: part.bytes for part in target_parts(accelerated, LOAD)}
    found = {part.name: part for part in target_parts(replace(accelerated, kept=(1000, 24)), LOAD)}
    assert found["target model"].bytes == 1024
    assert found["target embedding and head"].bytes == plain["target embedding and head"]
