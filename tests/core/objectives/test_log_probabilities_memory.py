"""What log-probabilities do not do: keep softmaxes, hold all logits of hidden states, gradients that nobody wants."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.objectives import hidden_log_probabilities, token_log_probabilities

N, V, H = 1024, 509, 5
BUDGET = 4 * V * 150
"""Chunks of about 140 tokens."""


class SmallOps(FusedOps):
    temporary_bytes = 4 * V * 10


class Making(TorchDispatchMode):
    """Notes storages that operators make beside those given, and how large they are."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.shapes: list[tuple[int, ...]] = []
        self.alive: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for out in found if isinstance(found, tuple | list) else (found,):
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self.given:
                self.given.add(out.untyped_storage().data_ptr())
                self.alive.append(out)
                self.shapes.append(tuple(out.shape))
        return found

    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)


def leaves(form: str, *frozen: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"logits": (N, V)} if form == "logits" else {"hidden": (N, H), "weight": (V, H), "bias": (V,)}
    return {name: torch.randn(shape).requires_grad_(name not in frozen) for name, shape in shapes.items()}


def run(given: dict[str, Tensor], entropy: bool = True) -> Tensor:
    """The sum of the outputs."""
    tokens_N = torch.arange(N) % V
    if "logits" in given:
        found = token_log_probabilities(given["logits"], tokens_N, SmallOps(), entropy=entropy)
    else:
        found = hidden_log_probabilities(
            given["hidden"], given["weight"], tokens_N, SmallOps(), bias_V=given["bias"], entropy=entropy, budget=BUDGET
        )
    total = found.log_probability_N.sum()
    return total if found.entropy_N is None else total + found.entropy_N.sum()


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_only_numbers_of_each_token_are_saved_beside_the_given(form: str, entropy: bool) -> None:
    given = leaves(form)
    inputs = {x.data_ptr() for x in given.values()}
    saved: list[Tensor] = []
    read: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: read.append(x) or x):
        loss = run(given, entropy)
    assert {x.data_ptr() for x in saved} >= inputs
    beside = [x for x in saved if x.data_ptr() not in inputs]
    assert len(beside) == 2 + entropy
    assert {x.shape for x in beside} == {(N,)}
    loss.backward()
    assert all(x.grad is not None for x in given.values())
    assert len(read) == len(saved), "once: hooks may bring it from elsewhere"


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_forward_only_saves_nothing(form: str) -> None:
    given, saved = leaves(form), []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = run(given)
    assert not loss.requires_grad
    assert not saved
    frozen = leaves(form, *given)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        assert not run(frozen).requires_grad
    assert not saved


def test_the_gradient_is_the_one_tensor_of_the_logits_size() -> None:
    given = leaves("logits")
    with Making(*given.values()) as making:
        loss = run(given)
        assert making.largest() <= 10 * V
        loss.backward()
    assert sum(shape == (N, V) for shape in making.shapes) == 1
    making.shapes.remove((N, V))
    assert making.largest() <= 10 * V


def test_logits_of_hidden_states_are_those_of_a_chunk() -> None:
    given = leaves("hidden")
    with Making(*given.values()) as making:
        run(given).backward()
    rows = making.largest() // V
    assert 128 <= rows <= 150
    assert 6 * rows < N


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ()], ids=str)
def test_what_is_frozen_has_no_gradient_and_no_room_for_one(frozen: tuple[str, ...]) -> None:
    given = leaves("hidden", *frozen)
    with Making(*given.values()) as making:
        run(given).backward()
    for name, shape in (("hidden", (N, H)), ("weight", (V, H)), ("bias", (V,))):
        assert (given[name].grad is None) == (name in frozen)
        assert (shape in making.shapes) == (name not in frozen), name


def test_measured_peaks(peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    """Beside the gradients: slices of rows, or a chunk's logits."""
    for form, most in (("logits", 5 * SmallOps.temporary_bytes), ("hidden", BUDGET + 5 * SmallOps.temporary_bytes)):
        given = leaves(form)
        gradients = sum(x.numel() * x.element_size() for x in given.values())
        numbers = 40 * 8 * N  # of each token, at most
        assert peak_bytes(lambda given=given: run(given).backward()) < gradients + most + numbers
        assert peak_bytes(lambda given=given: run(given).backward()) > gradients


def test_no_token_means_no_work(policies: ModuleType) -> None:
    """Not even a product, and gradients of zeros."""

    class Refusing(FusedOps):
        def wide_mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
            raise AssertionError("a product")

    for ignored, tokens in (("none", 0), ("all", 9)):
        case = policies.Case.random(policies.Cell(name="", form="hidden", ignored=ignored, tokens=tokens, bias=True))
        found = case.ours(ops=Refusing())
        assert not any(value.any() for value in found.values())
        assert {"hidden", "weight", "bias"} <= found.keys()
