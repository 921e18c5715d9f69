"""Any number of ranks and any accumulation give the gradients of one process, and those are the definition's."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

# fp64 sums in another order differ by a few units in the last place; fp32 by as much, amplified by Adam's division.
TOLERANCE = {"float64": 1e-13, "float32": 2e-6}


@pytest.fixture(scope="module")
def results(runs: dict[int, Path], cells: ModuleType) -> dict[int, dict[str, dict[str, Tensor]]]:
    """results[ranks][cell]: the tensors."""
    names = [cell["name"] for cell in cells.GRADIENTS]
    return {ranks: {name: load_file(path / f"{name}.safetensors") for name in names} for ranks, path in runs.items()}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor], prefixes: tuple[str, ...]) -> float:
    """Largest relative 2-norm difference of any tensor."""
    worst = 0.0
    for name, value in expected.items():
        if name.startswith(prefixes):
            scale = value.double().norm().clamp(min=1e-12)
            worst = max(worst, float((got[name].double() - value.double()).norm() / scale))
    return worst


COMPARED = ("grad.", "param.", "sum.", "norms", "losses", "tokens")


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("cell", ["float64", "float32", "holes", "whole", "lk_lambda-1", "lk_lambda-4"])
def test_ranks_give_one_processes_gradients_and_parameters(results: Any, ranks: int, cell: str) -> None:
    tolerance = TOLERANCE.get(cell, TOLERANCE["float64"])
    assert distance(results[ranks][cell], results[1][cell], COMPARED) <= tolerance


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_accumulation_changes_nothing(results: Any, ranks: int) -> None:
    assert distance(results[ranks]["whole"], results[ranks]["float64"], COMPARED) <= TOLERANCE["float64"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_what_the_window_before_decides_does_not_depend_on_accumulation(results: Any, ranks: int, size: int) -> None:
    """lk_lambda: the losses are of windows after the first."""
    got, want = results[ranks][f"lk_lambda-{size}"], results[1]["lk_lambda-7"]
    assert distance(got, want, COMPARED) <= TOLERANCE["float64"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_window_without_supervision_updates_nothing(results: Any, ranks: int) -> None:
    found = results[ranks]["nothing"]
    assert distance(found, {n: v for n, v in found.items() if n.startswith("grad.")}, ("grad.",)) == 0
    for name, value in found.items():
        if name.startswith("start."):
            assert torch.equal(found[name.replace("start.", "param.")], value)


@pytest.mark.parametrize("ranks", [2, 3])
def test_bfloat16_compute_keeps_fp32_parameters_and_sums(results: Any, ranks: int) -> None:
    one, many = results[1]["bfloat16"], results[ranks]["bfloat16"]
    for name, value in many.items():
        if name.startswith(("grad.", "param.")) and value.is_floating_point():
            assert value.dtype == torch.float32
    # Per-sample products are rounded to bf16 (8 bits) before they are summed; a mean would be off by half or more.
    assert distance(many, one, ("grad.", "sum.")) < 2e-2


@pytest.mark.parametrize("cell", ["float64", "holes"])
def test_gradients_are_those_of_the_definition(results: Any, tiny: ModuleType, cells: ModuleType, cell: str) -> None:
    """One explicit loop over samples, steps and positions in float64, without micro-batches, sums or sharding."""
    found = results[1][cell]
    options = next(entry for entry in cells.GRADIENTS if entry["name"] == cell)
    samples = tiny.TinySamples(count=options.get("count", 13), unsupervised=options.get("unsupervised", ()))
    target = tiny.RecurrentTarget(torch.float64)
    weights = {n.removeprefix("start."): v.clone() for n, v in found.items() if n.startswith("start.")}
    trained = {n: v.requires_grad_() for n, v in weights.items() if v.is_floating_point()}
    loss, total = torch.zeros((), dtype=torch.float64), 0.0
    for index in found["batch"].tolist():
        sample = samples[index]
        taps_TNH, _ = target.states(sample.input_ids_T.tolist(), target.zero())
        for i in range(sample.input_ids_T.numel()):
            hidden_H = torch.tanh(trained["fc.weight"] @ taps_TNH[i].flatten()) * trained["norm"]
            for k, weight in enumerate((1.0, 0.8)):
                j = i + 1 + k
                if j < sample.input_ids_T.numel() and sample.loss_mask_T[j]:
                    log_q_V = F.log_softmax(trained[f"heads.{k}.weight"] @ hidden_H, dim=0)
                    loss = loss - weight * log_q_V[sample.input_ids_T[j]]
                    total += weight
    loss.backward()
    assert float(found["sum.numerator"]) == pytest.approx(loss.item(), rel=1e-12)
    assert float(found["sum.denominator"]) == pytest.approx(total, rel=1e-12)
    assert float(found["losses"][0]) == pytest.approx(loss.item() / total, rel=1e-12)
    for name, value in trained.items():
        assert value.grad is not None
        assert torch.allclose(found[f"grad.{name}"], value.grad, rtol=0, atol=1e-12 * float(value.grad.norm()))
    norm = sum(float((v.grad / total).square().sum()) for v in trained.values() if v.grad is not None) ** 0.5
    assert float(found["norms"][0]) == pytest.approx(norm, rel=1e-12)
