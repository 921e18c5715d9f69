"""Operations counted without numbers: those of a real step, and those that publishers and definitions say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from torchspec.core import registry
from torchspec.core.config.load import load_config
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Algorithm, Moment, TrainingSample
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_outline import outline
from torchspec.core.models.target_spec import read_target_spec, resolve_target
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline.plan_flops import _CountedAttention, step_flops
from torchspec.core.pipeline.plan_target import TargetCost, target_cost
from torchspec.core.training.random_state import draw_of

TARGETS = Path(__file__).resolve().parents[2] / "fixtures" / "targets"
RECIPES = ("eagle3", "eagle3.1", "peagle", "dflash", "dspark", "domino")


class Products(TorchDispatchMode):
    """Adds up the multiplications and additions of matrix products while they run."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name == "mm" and len(args) == 2 else args[:2] if name == "mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name in ("bmm", "baddbmm"):
            a, b = args[:2] if name == "bmm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        return func(*args, **(kwargs or {}))


def algorithm_of(recipe: str, tmp_path: Path) -> tuple[Algorithm, TargetSpec]:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    values = {"target": {"path": "embedded"}, "data": {"train": [str(data)]}, "output": str(tmp_path / "run")}
    config, _ = load_config(file=Path(recipe), values=values)
    spec = read_target_spec(resolve_target(Path("embedded")))
    return registry.algorithms().spec(config.algorithm).create(config.draft, spec), spec


def sample_of(length: int, vocabulary: int) -> TrainingSample:
    torch.manual_seed(length)
    return TrainingSample(
        sample_id=f"s{length}",
        input_ids_T=torch.randint(0, vocabulary, (length,)),
        loss_mask_T=torch.rand(length) > 0.4,
    )


def really(algorithm: Algorithm, spec: TargetSpec, sample: TrainingSample) -> int:
    """Operations of the products of a step with numbers."""
    head = load_target_head(spec.path, dtype=torch.float32, device=torch.device("cpu"))
    vocabulary = VocabularyMap(ids_N=torch.arange(algorithm.vocabulary_size), target_size=spec.vocab_size)
    draft = algorithm.build_draft(vocabulary, head)
    length = sample.input_ids_T.numel()
    features = Features(
        input_ids_T=sample.input_ids_T,
        taps_TNH=torch.randn(length, len(algorithm.taps), spec.hidden_size),
        last_TH=torch.randn(length, spec.hidden_size),
        tap_layers=algorithm.taps,
        norm_state="post_norm",
    )
    rows = FeatureRows.of([features], [sample.loss_mask_T])
    moment = Moment(draws=(draw_of(0, 0, sample.sample_id),))
    with Products() as counted:
        result = algorithm.step(draft, head, rows, registry.load_device("cpu"), moment=moment)
        result.numerator.backward()
    return counted.flops


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_a_step_with_numbers(recipe: str, tmp_path: Path) -> None:
    algorithm, spec = algorithm_of(recipe, tmp_path)
    sample = sample_of(60, spec.vocab_size)
    assert step_flops(algorithm, spec, [sample]).products == really(algorithm, spec, sample)


def test_samples_are_averaged_and_layers_made_again_are_counted_again(tmp_path: Path) -> None:
    algorithm, spec = algorithm_of("eagle3", tmp_path)
    samples = [sample_of(length, spec.vocab_size) for length in (20, 40)]
    each = [step_flops(algorithm, spec, [sample]) for sample in samples]
    both = step_flops(algorithm, spec, samples)
    assert both.products == pytest.approx((each[0].products + each[1].products) / 2)
    assert both.attention == pytest.approx((each[0].attention + each[1].attention) / 2)
    again = step_flops(algorithm, spec, samples, recompute=True)
    assert 1.05 < again.all / both.all < 1.5
    assert again.operators > both.operators > 100


def test_nothing_random_is_used_up(tmp_path: Path) -> None:
    algorithm, spec = algorithm_of("dflash", tmp_path)
    sample = sample_of(30, spec.vocab_size)
    state = torch.get_rng_state()
    step_flops(algorithm, spec, [sample])
    assert torch.equal(state, torch.get_rng_state())


MASKS: dict[str, Callable[[], MaskSpec]] = {
    "full": MaskSpec.full,
    "causal": MaskSpec.causal,
    "causal below": lambda: MaskSpec.causal("lower_right"),
    "window": lambda: MaskSpec.sliding(3),
    "limits": lambda: MaskSpec.limits(torch.tensor([[0, 2, 5, 1, 0]]), torch.tensor([[3, 2, 9, 4, 1]])),
    "dense": lambda: MaskSpec.dense(torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(0)) > 0.5),
}


@pytest.mark.parametrize("kind", MASKS)
def test_attention_costs_what_its_mask_lets_in(kind: str) -> None:
    mask = MASKS[kind]()
    q, k = torch.zeros(2, 5, 4, 8), torch.zeros(2, 9, 2, 8)
    seen = int(mask.to_dense(5, 9, torch.device("cpu")).expand(2, -1, -1).sum())
    attention = _CountedAttention()
    out, lse = attention.forward(q, k, k, mask, 1.0)
    assert attention.flops == 4 * seen * 4 * 8  # q k^T and p v
    assert (out.shape, lse.shape) == (q.shape, (2, 4, 5))
    shapes = [grad.shape for grad in attention.backward(out, q, k, k, out, lse, mask, 1.0)]
    assert attention.flops == (4 + 10) * seen * 4 * 8  # q k^T again, dv, dp, dq, dk
    assert shapes == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("name", ["tiny_target", "tiny_llama", "tiny_deepseek"])
def test_a_targets_matrices_are_those_of_its_forward_pass(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    spec = read_target_spec(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager"
    ).model
    length = 12
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None])
    counts = counter.get_flop_counts()["Global"]
    products = sum(flops for operator, flops in counts.items() if "bmm" not in str(operator))
    cost = target_cost(spec, TargetWeights.open(path))
    assert 2 * cost.active * length == pytest.approx(products, rel=0.01)


def test_pairs_of_windows_and_of_whole_texts() -> None:
    length, window = 50, 8
    place = torch.arange(length)
    causal = place[:, None] >= place
    near = causal & (place[:, None] - place < window)
    cost = TargetCost(active=0, attention=3.0, full=2, local=5, window=window)
    assert cost.flops(length) == 3.0 * (2 * int(causal.sum()) + 5 * int(near.sum()))
    assert cost.flops(4) == 3.0 * 7 * 10


ACTIVATED = {
    "deepseek-v3.1": 37e9,  # 2412.19437, with embedding and head
    "gpt-oss-120b": 5.13e9,  # 2508.10925, without the embedding
    "gpt-oss-20b": 3.61e9,
    "kimi-k2.5": 32e9,
    "llama-3.1-8b": 8.03e9,
    "qwen3-30b-a3b": 3.35e9,
    "qwen3-235b-a22b": 22.2e9,
    "qwen3-8b": 8.19e9,
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_active_parameters_are_those_that_publishers_state(name: str, tmp_path: Path) -> None:
    shutil.copy(TARGETS / f"{name}.json", tmp_path / "config.json")
    spec = read_target_spec(tmp_path)
    ends = 1 if name.startswith("gpt-oss") else 2
    active = target_cost(spec, outline(tmp_path)).active + ends * spec.vocab_size * spec.hidden_size
    assert active == pytest.approx(ACTIVATED[name], rel=0.04)


def test_eagle3_takes_what_the_guide_works_out_by_hand(tmp_path: Path) -> None:
    """docs/sizing.md: 6 (3HH + K (H(A + 2C) + AH + 3HI + NH) + H(A + 2C)) a token, and the teacher's 2NH."""
    shutil.copy(TARGETS / "qwen3-8b.json", tmp_path / "config.json")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "x"}) + "\n")
    values = {"target": {"path": str(tmp_path)}, "data": {"train": [str(data)]}, "output": str(tmp_path / "run")}
    config, _ = load_config(file=Path("qwen3-8b"), values=values, planned=True)
    spec = read_target_spec(tmp_path)
    algorithm = registry.algorithms().spec("eagle3").create(config.draft, spec)
    sample = TrainingSample(
        sample_id="s", input_ids_T=torch.zeros(512, dtype=torch.int64), loss_mask_T=torch.ones(512, dtype=torch.bool)
    )
    h, a, c, i, n, k = 4096, 4096, 1024, 12288, 32000, 7
    by_hand = 6 * (3 * h * h + k * (h * (a + 2 * c) + a * h + 3 * h * i + n * h) + h * (a + 2 * c))
    teacher = 2 * spec.vocab_size * h
    assert step_flops(algorithm, spec, [sample]).products / 512 == pytest.approx(by_hand + teacher, rel=0.02)
