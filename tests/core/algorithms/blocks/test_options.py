"""From options, draft config and target to a draft of blocks; every misfit reported at once, every option of use."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from torchspec.core.algorithms.blocks.options import BlockOptions
from torchspec.core.algorithms.dflash.algorithm import DFlash
from torchspec.core.config.schema import stated
from torchspec.core.errors import ConfigError
from torchspec.core.features.rows import FeatureRows
from torchspec.core.interfaces.algorithm import Moment
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.registry import algorithms


@pytest.fixture
def spec(tiny_llama: Path) -> TargetSpec:
    return read_target_spec(tiny_llama)


def problems(target: TargetSpec, **options: Any) -> dict[str, str]:
    """What is reported, by field."""
    with pytest.raises(ConfigError) as caught:
        DFlash.create(BlockOptions(**options), target)
    return {problem.field: str(problem) for problem in caught.value.problems}


@pytest.fixture
def draft_config(tmp_path: Path) -> Callable[..., Path]:
    def write(**fields: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return path

    return write


IDLE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dflash", {"weighting": "dpace", "gamma": 4.0}, {"weighting": "dpace"}),
    ("dflash", {"dpace_smoothing": 0.2}, {"dpace_smoothing": 0.2, "weighting": "dpace"}),
    ("dflash", {"lk_eta": 2.0}, {"lk_eta": 2.0, "objective": {"lk_lambda": 1.0}}),
    ("eagle3", {"lk_eta": 2.0}, {"lk_eta": 2.0, "objective": {"lk_lambda": 1.0}}),
    (
        "dspark",
        {"confidence_head_with_markov": False, "confidence_weight": 0.0},
        {"confidence_head_with_markov": False},
    ),
    ("dspark", {"weighting": "dpace", "gamma": 7.0}, {"weighting": "dpace"}),
    ("domino", {"coverage": "weight"}, {"coverage": "drop"}),
    ("mtp", {"init": "random", "coverage": "weight"}, {"init": "random"}),
    ("peagle", {"depth_ratio": 1.0, "depth_ratio_min": 0.5}, {"depth_ratio": 0.9, "depth_ratio_min": 0.5}),
]


@pytest.mark.parametrize(("name", "idle", "used"), IDLE)
def test_an_option_that_changes_nothing_is_refused(
    spec: TargetSpec, name: str, idle: dict[str, Any], used: dict[str, Any]
) -> None:
    algorithm = algorithms().spec(name)
    with pytest.raises(ConfigError, match="means nothing") as caught:
        algorithm.create(algorithm.options(**idle), spec)
    assert [problem.field.removeprefix("draft.") in idle for problem in caught.value.problems] == [True]
    algorithm.create(algorithm.options(**used), spec)
    # A file of every setting says the defaults, too.
    defaults = {field: info.default for field, info in algorithm.options.model_fields.items()}  # type: ignore[attr-defined]
    algorithm.create(algorithm.options(**defaults | used), spec)


def test_geometry_comes_from_the_target(spec: TargetSpec) -> None:
    algorithm = DFlash.create(BlockOptions(), spec)
    geometry = algorithm.geometry
    assert algorithm.taps == (1, 2, 3, 4, 5)  # 8 layers: five, evenly from 1 to 5
    assert DFlash.create(BlockOptions(), replace(spec, num_layers=36)).taps == (1, 9, 17, 25, 33)
    assert geometry.layer_types == ("full",) * 5
    assert (geometry.block_size, geometry.mask_token, geometry.num_taps) == (16, 299, 5)
    assert (geometry.hidden_size, geometry.intermediate_size, geometry.head_dim) == (64, 96, 16)
    assert (geometry.draft_vocab_size, geometry.vocab_size) == (300, 300)
    assert DFlash.create(BlockOptions(sliding_window=8, num_layers=2), spec).geometry.layer_types == ("sliding",) * 2


def test_the_decay_is_in_proportion_to_the_block() -> None:
    assert BlockOptions().step_decay(16) == pytest.approx(math.exp(-1 / 7))
    assert BlockOptions().step_decay(8) == pytest.approx(math.exp(-1 / 3.5))
    assert BlockOptions(gamma=4.0).step_decay(8) == pytest.approx(math.exp(-1 / 4))


def test_every_misfit_is_reported_at_once(spec: TargetSpec) -> None:
    found = problems(
        spec,
        vocab_size=400,
        mask_token=300,
        taps=(5, 2),
        layer_types=("full", "full"),
        sliding_window=8,
        sliding_window_non_causal=True,
        num_key_value_heads=3,
        head_dim=7,
        block_size=300,
    )
    assert found.keys() == {
        "draft.vocab_size",
        "draft.mask_token",
        "draft.taps",
        "draft.layer_types",
        "draft.sliding_window",
        "draft.sliding_window_non_causal",
        "draft.num_key_value_heads",
        "draft.head_dim",
        "draft.block_size",
    }
    assert "2 kinds for 5 layers" in found["draft.layer_types"]
    assert list(problems(spec, layer_types=("sliding",), num_layers=1)) == ["draft.sliding_window"]


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 1},
        {"num_anchors": 0},
        {"gamma": 0},
        {"dpace_smoothing": 1.5},
        {"weighting": "none"},
        {"layer_types": ["linear"]},
        {"objective": {}},
        {"objective": {"mse": 1.0}},
        {"unroll": 3},
    ],
    ids=str,
)
def test_values_outside_their_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BlockOptions(**options)


def test_a_draft_config_gives_the_sizes(spec: TargetSpec, draft_config: Callable[..., Path]) -> None:
    path = draft_config(
        num_hidden_layers=3, block_size=7, intermediate_size=40, layer_types=["sliding_attention"] * 3,
        sliding_window=12, dflash_config={"mask_token_id": 5, "target_layer_ids": [0, 6], "causal": False},
    )  # fmt: skip
    algorithm = DFlash.create(BlockOptions(config=path), spec)
    geometry = algorithm.geometry
    assert algorithm.taps == (0, 6)
    assert (geometry.block_size, geometry.mask_token, geometry.intermediate_size) == (7, 5, 40)
    assert (geometry.layer_types, geometry.sliding_window) == (("sliding",) * 3, 12)
    assert geometry.sliding_window_non_causal
    assert "7" in problems(spec, config=path, block_size=9)["draft.block_size"]
    assert DFlash.create(BlockOptions(config=path.parent, block_size=7), spec).geometry == geometry


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "LlamaForCausalLMEagle3"),
        ({"speculators_model_type": "eagle3", "transformer_layer_config": {}}, "eagle3"),
        ({"block_size": "x"}, "block_size"),
        ({"hidden_size": 32}, "hidden_size"),
        ({"vocab_size": 77}, "vocab_size"),
    ],
)
def test_draft_configs_that_do_not_fit(
    spec: TargetSpec, draft_config: Callable[..., Path], fields: dict[str, Any], word: str
) -> None:
    assert word in problems(spec, config=draft_config(**fields))["draft.config"]


def test_the_decay_of_a_draft_config_is_that_of_its_block(spec: TargetSpec, draft_config: Callable[..., Path]) -> None:
    algorithm = DFlash.create(BlockOptions(config=draft_config(block_size=8)), spec)
    assert algorithm.decay == pytest.approx(math.exp(-1 / 3.5))


def test_options_that_a_checkpoint_kept_do_not_contradict_the_file(
    spec: TargetSpec, draft_config: Callable[..., Path]
) -> None:
    options = BlockOptions(config=draft_config(block_size=8, num_hidden_layers=2), num_anchors=3, mask_token=7)
    kept = options.model_dump(mode="json")
    assert problems(spec, **kept).keys() >= {"draft.block_size", "draft.num_layers"}
    again = BlockOptions(**stated(BlockOptions, kept))
    assert again == options
    assert DFlash.create(again, spec).geometry == DFlash.create(options, spec).geometry


def test_a_mask_token_without_an_embedding_is_refused(spec: TargetSpec, tiny_llama: Path) -> None:
    head = load_target_head(tiny_llama, dtype=torch.float32, device=torch.device("cpu"))
    head.embedding_VH[299] = 0
    with pytest.raises(ConfigError, match="mask_token"):
        DFlash.create(BlockOptions(), spec).build_draft(VocabularyMap.identity(300), head)
    DFlash.create(BlockOptions(mask_token=298), spec).build_draft(VocabularyMap.identity(300), head)
    with pytest.raises(ConfigError, match="vocabulary map"):
        DFlash.create(BlockOptions(mask_token=298), spec).build_draft(VocabularyMap.identity(200), head)


def test_a_draft_of_shapes_alone_can_be_built(spec: TargetSpec, tiny_llama: Path) -> None:
    with torch.device("meta"):
        head = load_target_head(tiny_llama, dtype=torch.float32, device=torch.device("meta"))
        vocabulary = VocabularyMap(ids_N=torch.arange(300), target_size=300)
        draft = DFlash.create(BlockOptions(), spec).build_draft(vocabulary, head)
    assert {parameter.device.type for parameter in draft.parameters()} == {"meta"}


CHANGES: dict[str, dict[str, Any]] = {
    "sample_from_anchor": {"sample_from_anchor": True},
    "mask_token": {"mask_token": 7},
    "num_anchors": {"num_anchors": 3},
    "gamma": {"gamma": 1.0},
    "weighting": {"weighting": "dpace"},
    "objective": {"objective": {"kl": 1.0}},
    "normalisation": {"normalisation": "per_sequence"},
    "sliding_window": {"sliding_window": 3},
    "block_size": {"block_size": 3},
    "taps": {"taps": (0, 3)},
    "num_layers": {"num_layers": 1},
    "intermediate_size": {"intermediate_size": 40},
}
OVER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "layer_types": ({"sliding_window": 3}, {"layer_types": ("full", "sliding")}),
    "sliding_window_non_causal": ({"sliding_window": 3}, {"sliding_window_non_causal": True}),
    "dpace_smoothing": ({"weighting": "dpace"}, {"dpace_smoothing": 0.1}),
    "coverage": ({"ids_N": torch.arange(0, 300, 2)}, {"coverage": "weight"}),
    "lk_eta": ({"objective": {"lk_lambda": 1.0}}, {"lk_eta": 1.0}),
}


@pytest.mark.parametrize(
    ("base", "change"), [*(({}, change) for change in CHANGES.values()), *OVER.values()], ids=[*CHANGES, *OVER]
)
def test_every_option_changes_the_training(
    make_world: Callable[..., Any], base: dict[str, Any], change: dict[str, Any]
) -> None:
    alphas = {"alpha": torch.full((3,), 4.0), "supervised": torch.full((3,), 8.0)}

    def loss(**options: Any) -> tuple[float, float]:
        world = make_world(**options)
        features = [world.features(world.tokens(n, n), n) for n in (19, 8)]
        rows = FeatureRows.of(features, [torch.ones(n, dtype=torch.bool) for n in (19, 8)])
        sums, grads = world.gradients([rows], [Moment(draws=(1, 2), previous=alphas)])
        size = sum(float(grad.square().sum()) for grad in grads.values())
        return float(sums["loss_numerator"] / sums["loss_denominator"]), size

    assert loss(**base) == loss(**base)
    assert loss(**base, **change) != loss(**base)
