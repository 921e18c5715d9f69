"""Every algorithm's step with rows padded to multiples of 16, and in FP8: nothing else changes, and what is said to be
multiplied by in FP8 is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchspec.core import registry
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Algorithm, Moment, StepResult
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import TargetHead, VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.ops.fp8 import E4M3, Scaling, scaled
from torchspec.core.ops.fp8_weight import Fp8Weight
from torchspec.core.ops.maps import Fp8Maps
from torchspec.core.training.fp8 import Fp8Compute, Gathering, described, fp8_weights
from torchspec.devices.cpu.ops import CpuOps

LENGTHS, PACKS = (37, 9, 20), [[0], [1, 2]]
SIZE = 96
KINDS: dict[str, dict[str, Any]] = {
    "eagle3": {"unroll": 3},
    "eagle3.1": {"unroll": 3},
    "eagle3 with latents": {
        "unroll": 3, "attention": "mla", "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16,
    },
    "peagle": {},
    "dflash": {"block_size": 4, "num_layers": 2},
    "dspark": {"block_size": 4, "num_layers": 2},
}  # fmt: skip


class World:
    """A draft for a tiny Llama, its target's head, and rows of made-up features."""

    def __init__(self, path: Path, kind: str, dtype: torch.dtype, size: int = SIZE) -> None:
        spec, target = registry.algorithms().spec(kind.split()[0]), read_target_spec(path)
        self.algorithm: Algorithm = spec.create(spec.options(vocab_size=size, **KINDS[kind]), target)
        self.head: TargetHead = load_target_head(path, dtype=dtype, device=torch.device("cpu"))
        vocabulary = VocabularyMap(ids_N=torch.arange(size), target_size=target.vocab_size)
        torch.manual_seed(0)
        self.draft: nn.Module = self.algorithm.build_draft(vocabulary, self.head)
        with torch.no_grad():
            for parameter in self.draft.parameters():
                if not parameter.any():  # behind it no gradient would be seen
                    parameter.normal_(std=0.1)
        self.draft.to(dtype)
        self.dtype, self.hidden, self.vocabulary = dtype, target.hidden_size, target.vocab_size

    def rows(self, slab: int) -> FeatureRows:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        features = [
            Features(
                input_ids_T=torch.randint(0, self.vocabulary, (length,), generator=generator),
                taps_TNH=random(length, len(self.algorithm.taps), self.hidden),
                last_TH=2 * random(length, self.hidden),
                tap_layers=self.algorithm.taps,
                norm_state="pre_norm",
            )
            for length in LENGTHS
        ]
        return FeatureRows.of(features, [torch.arange(n) % 5 > 0 for n in LENGTHS], PACKS, slab)

    def step(self, device: Device, slab: int = 1) -> tuple[StepResult, dict[str, Tensor]]:
        self.draft.zero_grad()
        moment = Moment(draws=(3, 1, 4))
        result = self.algorithm.step(self.draft, self.head, self.rows(slab), device, moment=moment)
        result.numerator.backward()
        grads = {name: p.grad.clone() for name, p in self.draft.named_parameters() if p.grad is not None}
        assert len(grads) == len(list(self.draft.parameters()))
        return result, grads


@pytest.mark.parametrize("kind", KINDS)
def test_padding_to_multiples_of_16_changes_nothing(tiny_llama: Path, kind: str) -> None:
    world, device = World(tiny_llama, kind, torch.float64), registry.load_device("cpu")
    (result, grads), (padded, others) = world.step(device), world.step(device, slab=16)
    torch.testing.assert_close(padded.numerator, result.numerator, rtol=1e-12, atol=0)
    for name, value in result.sums.items():
        torch.testing.assert_close(padded.sums[name], value, rtol=1e-12, atol=1e-12, msg=name)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_fp8_multiplies_by_what_it_says_it_does(
    tiny_llama: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its loss is near that in bf16."""
    world, device = World(tiny_llama, kind, torch.bfloat16), registry.load_device("cpu")
    bf16, _ = world.step(device, slab=16)
    met: dict[bool, set[int]] = {False: set(), True: set()}
    weight = Fp8Maps.weight

    def spied(self: Fp8Maps, weight_ZH: Tensor, *, across: bool = False, frozen: bool = False) -> Any:
        met[across].add(weight_ZH.untyped_storage().data_ptr())
        return weight(self, weight_ZH, across=across, frozen=frozen)

    monkeypatch.setattr(Fp8Maps, "weight", spied)
    compute = Fp8Compute(scaling="row")
    result, grads = world.step(compute.device(device), slab=16)
    assert result.numerator.item() == pytest.approx(bf16.numerator.item(), rel=0.03)
    assert all(grad.isfinite().all() for grad in grads.values())
    inside, outside = fp8_weights(world.draft)
    places = {name: p.untyped_storage().data_ptr() for name, p in world.draft.named_parameters()}
    assert {name for name, place in places.items() if place in met[False]} == set(inside)
    backward = {name for name, place in places.items() if place in met[True]}
    assert set(inside) - {"fc.weight"} <= backward <= set(inside), "fc mostly reads what needs no gradient"
    assert all(p.dim() != 2 or name in (*inside, *outside) or "embed" in name or "w1" in name
               for name, p in world.draft.named_parameters())  # fmt: skip
    frozen = met[False] - set(places.values())
    assert bool(frozen) == ("lm_head.weight" not in places), "the target's head, where the draft has none"


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_head_is_put_into_fp8_once_a_run_and_a_trained_one_each_time(tiny_llama: Path, kind: str) -> None:
    world, compute = World(tiny_llama, kind, torch.bfloat16), Fp8Compute(scaling="row")
    device = registry.load_device("cpu")
    made = []
    for _ in range(2):
        world.step(compute.device(device), slab=16)
        made.append([operand for _, _, operand in compute.frozen._made.values()])
    owns = "lm_head.weight" in dict(world.draft.named_parameters())
    assert len(made[0]) == (0 if owns else 2)
    assert all(again is first for again, first in zip(made[1], made[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_ranks_may_gather_in_fp8_are_read_in_it_alone(
    tiny_llama: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one scale nothing else is made of them. The step's loss and gradients are those of the bf16 weights."""
    world, device = World(tiny_llama, kind, torch.bfloat16), registry.load_device("cpu")
    compute, temporary_bytes = Fp8Compute(scaling="tensor"), 1 << 20
    result, grads = world.step(compute.device(device), slab=16)
    names = Gathering(scaling="tensor", head_in_parts=False).weights(world.draft)
    assert set(fp8_weights(world.draft)[0]) - set(names) == ({"fc.weight"} if kind == "peagle" else set())
    for name in names:
        module, _, own = name.rpartition(".")
        operand = scaled(world.draft.get_parameter(name).detach(), E4M3, "tensor", temporary_bytes)
        weight = nn.Parameter(Fp8Weight(operand.values, operand.scale))
        world.draft.get_submodule(module)._parameters[own] = weight

    def plain(self: Fp8Weight) -> Tensor:
        raise AssertionError("read in bf16")

    monkeypatch.setattr(Fp8Weight, "plain", plain)
    gathered, others = world.step(compute.device(device), slab=16)
    assert gathered.numerator.item() == pytest.approx(result.numerator.item(), rel=1e-4)
    far = sum(float((others[name].double() - grad.double()).square().sum()) for name, grad in grads.items())
    assert far <= 1e-6 * sum(float(grad.double().square().sum()) for grad in grads.values())


def test_a_head_of_which_ranks_read_parts_is_not_gathered_in_fp8(tiny_llama: Path) -> None:
    draft = World(tiny_llama, "eagle3", torch.bfloat16).draft
    whole, parts = (Gathering(scaling="row", head_in_parts=it).weights(draft) for it in (False, True))
    assert set(whole) - set(parts) == {"lm_head.weight"}
    assert set(parts) < set(whole)


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_seen_in_the_loss(tiny_llama: Path, scaling: Scaling, bad: float) -> None:
    """Which stops a run before its update."""
    world = World(tiny_llama, "eagle3", torch.bfloat16)
    with torch.no_grad():
        dict(world.draft.named_parameters())["midlayer.mlp.up_proj.weight"][3, 4] = bad
    result, _ = world.step(Fp8Compute(scaling=scaling).device(registry.load_device("cpu")), slab=16)
    assert not result.numerator.isfinite()


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_a_step_in_fp8_reads_no_number_from_the_device(
    tiny_llama: Path, kind: str, step_without_values: Callable[..., None]
) -> None:
    world = World(tiny_llama, kind, torch.bfloat16)
    algorithm, rows = world.algorithm, world.rows(16)
    compute = Fp8Compute(scaling="row")

    def step(draft: nn.Module, head: TargetHead, rows: FeatureRows, device: Device, *rest: Any) -> StepResult:
        return algorithm.step(draft, head, rows, compute.device(replace(device, ops=CpuOps())), *rest)

    world.algorithm = SimpleNamespace(step=step)  # type: ignore[assignment]
    step_without_values(world, rows, Moment(draws=(3, 1, 4)))


def test_a_head_of_another_size_stays_in_bf16_and_is_named(tiny_llama: Path) -> None:
    world = World(tiny_llama, "eagle3", torch.bfloat16, size=100)
    inside, outside = fp8_weights(world.draft)
    assert outside == ["lm_head.weight"]
    text = described(world.draft, "row", None)
    assert f"{len(inside)} weights" in text
    assert "in bfloat16 stay lm_head.weight" in text
    assert world.step(Fp8Compute(scaling="row").device(registry.load_device("cpu")))[0].numerator.isfinite()
