"""From options, draft config and target to a draft; every misfit reported at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.errors import ConfigError
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec


@pytest.fixture
def spec(tiny_llama: Path) -> TargetSpec:
    return read_target_spec(tiny_llama)


SPECULATORS = {"speculators_model_type": "eagle3", "transformer_layer_config": {}}


def problems(target: TargetSpec, **options: Any) -> dict[str, str]:
    """What is reported, by field."""
    with pytest.raises(ConfigError) as caught:
        Eagle3.create(Eagle3Options(**options), target)
    return {problem.field: str(problem) for problem in caught.value.problems}


@pytest.fixture
def draft_config(tmp_path: Path) -> Callable[..., Path]:
    def write(**fields: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return path

    return write


def test_geometry_comes_from_the_target(spec: TargetSpec) -> None:
    algorithm = Eagle3.create(Eagle3Options(), spec)
    geometry = algorithm.geometry
    assert algorithm.taps == (1, 3, 4)  # 8 layers: 1, 8 // 2 - 1, 8 - 4
    assert (geometry.hidden_size, geometry.intermediate_size, geometry.head_dim) == (64, 96, 16)
    assert (geometry.num_attention_heads, geometry.num_key_value_heads) == (4, 2)
    assert (geometry.draft_vocab_size, geometry.vocab_size) == (300, 300)
    assert geometry.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert not geometry.owns_embedding


def test_large_vocabularies_are_pruned_by_default(spec: TargetSpec) -> None:
    assert Eagle3.create(Eagle3Options(), replace(spec, vocab_size=151_936)).geometry.draft_vocab_size == 32_000


@pytest.mark.parametrize("layers", [1, 4, 6])
def test_default_taps_that_collide_are_refused(spec: TargetSpec, layers: int) -> None:
    shallow = replace(spec, num_layers=layers)
    found = problems(shallow)
    assert "collide" in found["draft.taps"]
    assert "remedy" in found["draft.taps"]
    assert Eagle3.create(Eagle3Options(taps=(0,)), shallow).taps == (0,)


def test_seven_layers_are_enough(spec: TargetSpec) -> None:
    assert Eagle3.create(Eagle3Options(), replace(spec, num_layers=7)).taps == (1, 2, 3)


@pytest.mark.parametrize("taps", [(1, 8), (3, 1), (2, 2, 5), ()])
def test_taps_that_do_not_exist_or_are_out_of_order(spec: TargetSpec, taps: tuple[int, ...]) -> None:
    assert list(problems(spec, taps=taps)) == ["draft.taps"]


def test_everything_wrong_is_reported_at_once(spec: TargetSpec, draft_config: Callable[..., Path]) -> None:
    path = draft_config(
        vocab_size=999,
        draft_vocab_size=301,
        target_hidden_size=1234,
        num_attention_heads=4,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )
    options = Eagle3Options(config=path, taps=(0, 9), num_key_value_heads=3, head_dim=15)
    with pytest.raises(ConfigError) as caught:
        Eagle3.create(options, spec)
    text = str(caught.value)
    assert "7 configuration errors" in text
    for part in ("and not 9", "999", "1234", "301", "divide the 4", "15", "dynamic"):
        assert part in text


def test_a_draft_config_gives_the_geometry(spec: TargetSpec, draft_config: Callable[..., Path]) -> None:
    path = draft_config(
        architectures=["LlamaForCausalLMEagle3"],
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=77,
        vocab_size=300,
        draft_vocab_size=123,
        target_hidden_size=64,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=None,
        max_position_embeddings=999,
    )
    geometry = Eagle3.create(Eagle3Options(config=path), spec).geometry
    assert (geometry.hidden_size, geometry.head_dim, geometry.intermediate_size) == (48, 8, 77)
    assert (geometry.draft_vocab_size, geometry.max_position_embeddings) == (123, 999)
    assert geometry.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert geometry.owns_embedding
    assert Eagle3Options(config=path.parent) == Eagle3Options(config=path)


def test_speculators_configs_number_layers_from_the_embedding(
    spec: TargetSpec, draft_config: Callable[..., Path]
) -> None:
    path = draft_config(
        speculators_model_type="eagle3",
        transformer_layer_config={"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 300},
        eagle_aux_hidden_state_layer_ids=[1, 4, 7],
        norm_before_residual=True,
    )
    algorithm = Eagle3.create(Eagle3Options(config=path), spec)
    assert algorithm.taps == (0, 3, 6)
    assert algorithm.geometry.norm_before_residual


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"speculators_model_type": "eagle3"}, "transformer_layer_config"),
        ({"speculators_model_type": "dflash", "transformer_layer_config": {}}, "speculators_model_type is 'dflash'"),
        ({"architectures": ["EagleLlamaForCausalLM"]}, "architectures is ['EagleLlamaForCausalLM']"),
        ({"architectures": ["BertModel"]}, "architectures is ['BertModel']"),
        ({"architectures": 5}, "architectures must be a list of names, got 5"),
        ({"norm_output": True}, "EAGLE-3.1"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}}, "2 taps"),
        ({"eagle_config": "abc"}, "eagle_config must be an object"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": 3}}, "must be a list of layer numbers, got 3"),
        ({**SPECULATORS, "eagle_aux_hidden_state_layer_ids": "abc"}, "must be a list of layer numbers, got 'abc'"),
        ({**SPECULATORS, "eagle_aux_hidden_state_layer_ids": [1, 2.5]}, "must be a list of layer numbers"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta must be a positive number"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_theta": 1e4, "rope_scaling": "linear"}, "rope_scaling must be an object"),
    ],
)
def test_draft_configs_of_another_kind_are_refused(
    spec: TargetSpec, draft_config: Callable[..., Path], fields: dict[str, Any], message: str
) -> None:
    assert message in " ".join(problems(spec, config=draft_config(**fields)).values())


@pytest.mark.parametrize("fields", [{"eagle_config": None}, {"eagle_config": {}}, {"rope_theta": None}])
def test_fields_without_a_value_are_not_there(
    spec: TargetSpec, draft_config: Callable[..., Path], fields: dict[str, Any]
) -> None:
    plain = Eagle3.create(Eagle3Options(), spec)
    assert Eagle3.create(Eagle3Options(config=draft_config(**fields)), spec).geometry == plain.geometry


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_draft_configs_that_cannot_be_read(spec: TargetSpec, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "draft.json"
    if content is not None:
        path.write_text(content)
    assert list(problems(spec, config=path)) == ["draft.config"]


def test_a_field_given_twice_must_agree(spec: TargetSpec, draft_config: Callable[..., Path]) -> None:
    path = draft_config(hidden_size=48)
    assert "48" in problems(spec, config=path, hidden_size=32)["draft.hidden_size"]
    assert Eagle3.create(Eagle3Options(config=path, hidden_size=48), spec).geometry.hidden_size == 48


@pytest.mark.parametrize(
    "rope", [{"full_attention": {"rope_theta": 1e4}}, {"rope_type": "longrope", "rope_theta": 1e4}]
)
def test_ropes_that_a_llama_layer_cannot_take_over(spec: TargetSpec, rope: dict[str, object]) -> None:
    assert list(problems(replace(spec, rope_parameters=rope))) == ["draft.config"]


@pytest.mark.parametrize("kind", ["default", "proportional"])
def test_what_only_the_target_reads_of_its_rope_is_left_behind(spec: TargetSpec, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e6, "partial_rotary_factor": 0.5, "mrope_section": [1, 2]}
    geometry = Eagle3.create(Eagle3Options(), replace(spec, rope_parameters=rope)).geometry
    assert geometry.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


def test_state_dict_is_the_published_checkpoint(spec: TargetSpec, tiny_llama: Path) -> None:
    algorithm = Eagle3.create(Eagle3Options(vocab_size=100), spec)
    head = load_target_head(tiny_llama, dtype=torch.bfloat16, device=torch.device("cpu"))
    ids = torch.arange(50, 250, 2)
    draft = algorithm.build_draft(VocabularyMap(ids_N=ids, target_size=300), head)
    state = draft.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "fc.weight": (64, 192),
        "midlayer.hidden_norm.weight": (64,),
        "midlayer.input_layernorm.weight": (64,),
        "midlayer.post_attention_layernorm.weight": (64,),
        "midlayer.self_attn.q_proj.weight": (64, 128),
        "midlayer.self_attn.k_proj.weight": (32, 128),
        "midlayer.self_attn.v_proj.weight": (32, 128),
        "midlayer.self_attn.o_proj.weight": (64, 64),
        "midlayer.mlp.gate_proj.weight": (96, 64),
        "midlayer.mlp.up_proj.weight": (96, 64),
        "midlayer.mlp.down_proj.weight": (64, 96),
        "norm.weight": (64,),
        "lm_head.weight": (100, 64),
        "d2t": (100,),
        "t2d": (300,),
    }
    assert state["d2t"].dtype == torch.int64
    assert torch.equal(torch.arange(100) + state["d2t"], ids)
    assert torch.equal(state["t2d"].nonzero()[:, 0], ids)
    assert {p.dtype for p in draft.parameters()} == {torch.float32}
    assert torch.equal(state["lm_head.weight"], head.head_VH[ids].float())


def test_a_draft_of_another_width_brings_its_embedding(spec: TargetSpec, tiny_llama: Path) -> None:
    algorithm = Eagle3.create(Eagle3Options(hidden_size=32), spec)
    head = load_target_head(tiny_llama, dtype=torch.float32, device=torch.device("cpu"))
    draft = algorithm.build_draft(VocabularyMap.identity(300), head)
    assert draft.state_dict()["embed_tokens.weight"].shape == (300, 32)
    assert draft.state_dict()["fc.weight"].shape == (32, 192)


def test_a_draft_of_shapes_alone_can_be_built(spec: TargetSpec, tiny_llama: Path) -> None:
    """For plans: on the meta device nothing takes memory."""
    algorithm = Eagle3.create(Eagle3Options(), spec)
    with torch.device("meta"):
        head = load_target_head(tiny_llama, dtype=torch.float32, device=torch.device("meta"))
        vocabulary = VocabularyMap(ids_N=torch.arange(300), target_size=300)
        draft = algorithm.build_draft(vocabulary, head)
    assert {parameter.device.type for parameter in draft.parameters()} == {"meta"}


def test_initialisation_is_reproducible(spec: TargetSpec, tiny_llama: Path) -> None:
    algorithm = Eagle3.create(Eagle3Options(), spec)
    head = load_target_head(tiny_llama, dtype=torch.float32, device=torch.device("cpu"))
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(algorithm.build_draft(VocabularyMap.identity(300), head).state_dict()["fc.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    "vocabulary", [VocabularyMap.identity(200), VocabularyMap(ids_N=torch.arange(99), target_size=300)]
)
def test_a_vocabulary_map_of_other_sizes_is_refused(
    spec: TargetSpec, tiny_llama: Path, vocabulary: VocabularyMap
) -> None:
    head = load_target_head(tiny_llama, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="vocabulary map"):
        Eagle3.create(Eagle3Options(), spec).build_draft(vocabulary, head)
