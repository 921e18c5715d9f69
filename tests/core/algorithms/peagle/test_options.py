"""What is refused, with what remedy; and what is derived where nothing is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from torchspec.core.algorithms.peagle.algorithm import PEagle
from torchspec.core.algorithms.peagle.options import PEagleOptions
from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.registry import algorithms

CONFIG: dict[str, Any] = {
    "speculators_model_type": "peagle",
    "transformer_layer_config": {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 300},
    "mask_token_id": 9,
    "eagle_aux_hidden_state_layer_ids": [1, 3],
}


def test_the_algorithm_is_registered() -> None:
    spec = algorithms().spec("peagle")
    assert spec.name == "peagle"
    assert spec.reads(CONFIG)
    assert not spec.reads({"speculators_model_type": "eagle3"})
    assert not spec.reads({"architectures": ["LlamaForCausalLMEagle3"]})


def test_defaults_come_from_the_target(tiny_llama: Path) -> None:
    algorithm = PEagle.create(PEagleOptions(), read_target_spec(tiny_llama))
    geometry = algorithm.geometry
    assert (geometry.num_layers, geometry.mask_token, algorithm.options.depths) == (4, 299, 8)
    assert (algorithm.options.depth_ratio, algorithm.options.depth_ratio_min) == (0.7, 0.2)
    assert algorithm.taps == (1, 3, 4)
    assert algorithm.halo == 8
    assert algorithm.layouts == ("speculators",)


def test_a_draft_config_says_the_geometry(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    algorithm = PEagle.create(PEagleOptions(config=tmp_path), read_target_spec(tiny_llama))
    assert (algorithm.geometry.num_layers, algorithm.geometry.mask_token) == (2, 9)
    assert algorithm.taps == (0, 2)


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({}, {"num_layers": 3}, "draft.num_layers"),
        ({}, {"mask_token": 300}, "tokens 0..299"),
        ({"mask_token_id": -1}, {}, "mask_token_id"),
        ({"speculators_model_type": "eagle3"}, {}, "'peagle'"),
        ({"norm_before_fc": True}, {}, "norm_before_fc"),
        ({"transformer_layer_config": {"model_type": "qwen3"}}, {}, "'llama'"),
        ({"transformer_layer_config": {"num_hidden_layers": 0}}, {}, "num_hidden_layers"),
        ({"transformer_layer_config": {"attention_bias": True}}, {}, "attention_bias"),
        ({"transformer_layer_config": {"vocab_size": 299}}, {}, "vocab_size"),
    ],
)
def test_what_does_not_fit_is_named(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ConfigError) as caught:
        PEagle.create(PEagleOptions(config=tmp_path, **options), read_target_spec(tiny_llama))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"depths": 1}, {"depth_ratio": 0}, {"depth_ratio": 1.1}, {"depth_ratio_min": -0.1}, {"num_layers": 0}]
)
def test_options_have_bounds(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PEagleOptions(**options)


def test_a_map_of_another_size_is_refused(make_world: Callable[..., Any]) -> None:
    world = make_world(num_layers=1)
    with pytest.raises(ConfigError, match="vocabulary map"):
        world.algorithm.build_draft(VocabularyMap(ids_N=torch.arange(5), target_size=300), world.head)


def test_layers_behind_the_first_start_by_adding_nothing(tiny_llama: Path, make_world: Callable[..., Any]) -> None:
    world = make_world(num_layers=3)
    torch.manual_seed(0)
    draft = world.algorithm.build_draft(VocabularyMap.identity(300), world.head)
    for layer in list(draft.every_layer())[1:]:
        x_BQH = torch.randn(1, 4, 64)
        mixed = torch.randn(1, 4, 4, 16)
        assert torch.equal(layer.finish(x_BQH, mixed, world.device.ops), x_BQH)
    assert draft.mask_hidden.any()
