"""A draft layer with latent attention: its sizes from target, options and configs, and what of them is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspec.core import registry
from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec

SIZES = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
PUBLISHED = {
    "architectures": ["Eagle3DeepseekV2ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "rope_scaling": {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0},
    "vocab_size": 300,
    "draft_vocab_size": 300,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.fixture
def deepseek(tiny_deepseek: Path) -> TargetSpec:
    return read_target_spec(tiny_deepseek)


@pytest.fixture
def llama(tiny_llama: Path) -> TargetSpec:
    return read_target_spec(tiny_llama)


@pytest.fixture
def draft_config(tmp_path: Path) -> Callable[..., Path]:
    def write(**fields: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
        return path

    return write


def geometry(target: TargetSpec, **options: Any) -> Any:
    return Eagle3.create(Eagle3Options(**options), target).geometry


def problems(target: TargetSpec, **options: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        geometry(target, **options)
    return {problem.field: str(problem) for problem in caught.value.problems}


def sizes(found: Any) -> dict[str, int]:
    return {name: getattr(found, name) for name in SIZES}


def test_sizes_come_from_the_target(deepseek: TargetSpec) -> None:
    found = geometry(deepseek, attention="mla")
    assert sizes(found) == SIZES
    assert (found.attention, found.num_attention_heads, found.num_key_value_heads, found.head_dim) == ("mla", 4, 4, 16)
    assert found.rope_parameters["mscale_all_dim"] == 1.2
    algorithm = Eagle3.create(Eagle3Options(attention="mla", unroll=5), deepseek)
    shape = algorithm.attention_shape
    assert (shape.query_heads, shape.key_heads, shape.head_size, shape.steps) == (4, 4, 16, 5)
    assert algorithm.layouts == ("plain",)


def test_grouped_queries_are_the_default(deepseek: TargetSpec) -> None:
    for options in ({}, {"attention": "gqa"}):
        found = geometry(deepseek, **options)
        assert (found.attention, found.head_dim) == ("gqa", 4)


def test_options_go_before_the_target(deepseek: TargetSpec) -> None:
    found = geometry(deepseek, attention="mla", kv_lora_rank=40, v_head_dim=32, num_attention_heads=2)
    assert sizes(found) == SIZES | {"kv_lora_rank": 40, "v_head_dim": 32}
    assert (found.num_key_value_heads, found.head_dim) == (2, 32)


def test_a_target_without_a_rank_of_queries(deepseek: TargetSpec) -> None:
    lite = replace(deepseek, latent_sizes={n: s for n, s in SIZES.items() if n != "q_lora_rank"})
    assert geometry(lite, attention="mla").q_lora_rank == 96


def test_for_another_target_all_sizes_are_to_be_given(llama: TargetSpec) -> None:
    found = problems(llama, attention="mla", v_head_dim=16)
    assert found.keys() == {f"draft.{name}" for name in SIZES if name != "v_head_dim"}
    assert "draft.kv_lora_rank=512" in found["draft.kv_lora_rank"]
    assert sizes(geometry(llama, attention="mla", **SIZES)) == SIZES


def test_options_of_the_other_kind_are_refused(deepseek: TargetSpec) -> None:
    found = problems(deepseek, attention="mla", head_dim=16, num_key_value_heads=2, norm_before_residual=True)
    assert found.keys() == {"draft.head_dim", "draft.num_key_value_heads", "draft.norm_before_residual"}
    assert problems(deepseek, kv_lora_rank=16, v_head_dim=4).keys() == {"draft.kv_lora_rank", "draft.v_head_dim"}


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"qk_rope_head_dim": 5}, "draft.qk_rope_head_dim", "must be even"),
        ({"num_attention_heads": 3}, "draft.num_attention_heads", "must divide the hidden size 64"),
        ({"taps": (6,)}, "draft.taps", "past fc"),
    ],
)
def test_layers_that_no_engine_serves(deepseek: TargetSpec, options: dict[str, Any], field: str, message: str) -> None:
    found = problems(deepseek, attention="mla", **options)
    assert found.keys() == {field}
    assert message in found[field]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "not by 'linear'"),
        (YARN | {"attention_factor": 1.2, "truncate": False}, "do not read attention_factor and truncate"),
        (
            {n: v for n, v in YARN.items() if n != "original_max_position_embeddings"},
            "original_max_position_embeddings",
        ),
    ],
)
def test_rotations_that_engines_do_not_have(deepseek: TargetSpec, rope: dict[str, Any], message: str) -> None:
    found = problems(replace(deepseek, rope_parameters=rope), attention="mla")
    assert list(found) == ["draft.config"]
    assert message in found["draft.config"]


def test_published_configs_are_read(deepseek: TargetSpec, draft_config: Callable[..., Path]) -> None:
    found = geometry(deepseek, config=draft_config(**PUBLISHED))
    assert sizes(found) == {name: PUBLISHED[name] for name in SIZES}
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (2, 2, 24)
    assert (found.rope_parameters["rope_type"], found.rope_parameters["rope_theta"]) == ("yarn", 5e4)
    assert "says gqa" not in str(found)
    assert "says mla" in problems(deepseek, config=draft_config(**PUBLISHED), attention="gqa")["draft.attention"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"q_lora_rank": None}, "it has no q_lora_rank"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a positive integer"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
    ],
)
def test_configs_that_engines_would_serve_otherwise(
    deepseek: TargetSpec, draft_config: Callable[..., Path], fields: dict[str, Any], message: str
) -> None:
    assert message in problems(deepseek, config=draft_config(**PUBLISHED | fields))["draft.config"]


def test_a_llama_config_is_not_latent(deepseek: TargetSpec, draft_config: Callable[..., Path]) -> None:
    path = draft_config(architectures=["LlamaForCausalLMEagle3"], num_attention_heads=4, hidden_size=64)
    assert "says gqa" in problems(deepseek, config=path, attention="mla")["draft.attention"]


@pytest.mark.parametrize(
    ("fields", "name"), [({}, "eagle3"), ({"fc_norm": True, "norm_output": True}, "eagle3.1")], ids=str
)
def test_who_reads_a_published_config(fields: dict[str, Any], name: str) -> None:
    readers = [known for known in ("eagle3", "eagle3.1") if registry.algorithms().spec(known).reads(PUBLISHED | fields)]
    assert readers == [name]


def test_state_dict_is_the_published_checkpoint(deepseek: TargetSpec, tiny_deepseek: Path) -> None:
    algorithm = Eagle3.create(Eagle3Options(attention="mla"), deepseek)
    head = load_target_head(tiny_deepseek, dtype=torch.float32, device=torch.device("cpu"))
    state = algorithm.build_draft(VocabularyMap.identity(300), head).state_dict()
    prefix = "midlayer.self_attn."
    found = {name.removeprefix(prefix): tuple(t.shape) for name, t in state.items() if name.startswith(prefix)}
    assert found == {
        "q_a_proj.weight": (24, 128),
        "q_a_layernorm.weight": (24,),
        "q_b_proj.weight": (48, 24),
        "kv_a_proj_with_mqa.weight": (36, 128),
        "kv_a_layernorm.weight": (32,),
        "kv_b_proj.weight": (56, 32),
        "o_proj.weight": (64, 24),
    }
