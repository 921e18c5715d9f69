"""What is read from a target's configuration, and what is said when it cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma4Config, GPT2Config, PreTrainedConfig

from torchspec.core.errors import TargetError
from torchspec.core.models.target_spec import load_target_config, read_target_spec, resolve_target

EditConfig = Callable[..., Path]


@pytest.fixture
def edited(tiny_target: Path, tmp_path: Path) -> EditConfig:
    """A copy of the tiny target with fields of config.json changed; None removes one."""

    def edit(**fields: Any) -> Path:
        copy = shutil.copytree(tiny_target, tmp_path / "copy")
        content = {**json.loads((copy / "config.json").read_text()), **fields}
        kept = {name: value for name, value in content.items() if value is not None}
        (copy / "config.json").write_text(json.dumps(kept))
        return copy

    return edit


def test_facts_of_a_plain_target(tiny_target: Path) -> None:
    spec = read_target_spec(tiny_target)
    assert (spec.architecture, spec.model_type) == ("Qwen3ForCausalLM", "qwen3")
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size) == (8, 64, 96)
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (4, 2, 16)
    assert (spec.vocab_size, spec.max_position_embeddings) == (300, 512)
    assert (spec.dtype, spec.tie_word_embeddings, spec.eos_token_ids) == (torch.float32, True, (2,))
    assert spec.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_latent_attention(tiny_deepseek: Path, tiny_target: Path, tmp_path: Path) -> None:
    sizes = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    assert read_target_spec(tiny_deepseek).latent_sizes == sizes
    assert read_target_spec(tiny_target).latent_sizes is None
    content = json.loads((tiny_deepseek / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "q_lora_rank": None}))
    del sizes["q_lora_rank"]
    assert read_target_spec(tmp_path).latent_sizes == sizes


def test_untied(tiny_llama: Path) -> None:
    assert not read_target_spec(tiny_llama).tie_word_embeddings


def test_multimodal_target_gives_its_language_model(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 50, "head_dim": 8, "num_attention_heads": 4}
    Gemma3Config(
        text_config={**text, "num_key_value_heads": 1}, architectures=["Gemma3ForConditionalGeneration"]
    ).save_pretrained(tmp_path)
    spec = read_target_spec(tmp_path)
    assert (spec.architecture, spec.model_type) == ("Gemma3ForConditionalGeneration", "gemma3_text")
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (4, 32, 50)
    assert spec.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}, "those of full attention"


def test_of_layers_that_differ_the_first_counts(tmp_path: Path) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "attention_k_eq_v": True}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    wide = {"num_global_key_value_heads": 2, "global_head_dim": 32}
    Gemma4Config(text_config={**kinds, **heads, **wide}).save_pretrained(tmp_path)
    spec = read_target_spec(tmp_path)
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (8, 4, 16)
    assert (spec.rope_parameters["rope_type"], spec.rope_parameters["rope_theta"]) == ("proportional", 1e6)


def test_old_names_and_no_rotary_embedding(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50).save_pretrained(tmp_path)
    spec = read_target_spec(tmp_path)
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size, spec.head_dim) == (3, 32, 128, 8)
    assert (spec.num_key_value_heads, spec.max_position_embeddings, spec.rms_norm_eps) == (4, 1024, 1e-5)
    assert spec.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5, "rope_parameters": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 2e6, "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 2e6, "factor": 2.0},
        ),
    ],
    ids=["theta", "theta-and-scaling", "parameters"],
)
def test_rope_in_old_and_new_form(edited: EditConfig, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_target_spec(edited(**fields)).rope_parameters == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_in_old_and_new_form(edited: EditConfig, key: str) -> None:
    assert read_target_spec(edited(**{"dtype": None, key: "bfloat16"})).dtype == torch.bfloat16


def test_no_dtype_is_float32(edited: EditConfig) -> None:
    assert read_target_spec(edited(dtype=None)).dtype == torch.float32


def test_end_of_turn_from_generation_config_then_config_then_tokenizer(edited: EditConfig) -> None:
    path = edited(eos_token_id=7)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert read_target_spec(path).eos_token_ids == (5, 6)
    (path / "generation_config.json").write_text(json.dumps({}))
    assert read_target_spec(path).eos_token_ids == (7,)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert read_target_spec(path).eos_token_ids == (2,), "<|im_end|> of the tokenizer"
    for file in path.glob("tokenizer*"):
        file.unlink()
    assert read_target_spec(path).eos_token_ids == ()


def test_resolve_says_what_a_target_directory_holds(tmp_path: Path) -> None:
    assert resolve_target(str(tmp_path)) == tmp_path
    with pytest.raises(TargetError, match=r"nowhere does not exist: .*config\.json.*model\.safetensors"):
        resolve_target(tmp_path / "nowhere")
    with pytest.raises(TargetError, match="hf download Qwen/Qwen3-8B --local-dir DIR"):
        resolve_target("Qwen/Qwen3-8B")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(TargetError, match="is a file; give the directory"):
        resolve_target(file)


def test_broken_configurations_are_named(tmp_path: Path, edited: EditConfig) -> None:
    with pytest.raises(TargetError, match=r"has no config\.json"):
        read_target_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3",')
    with pytest.raises(TargetError, match=r"config\.json cannot be read: .*line 1"):
        read_target_spec(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(TargetError, match="holds a list where a JSON object belongs"):
        read_target_spec(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TargetError, match="no `model_type`"):
        read_target_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(TargetError, match=r"model_type 'no_such_model'\) is refused") as caught:
        read_target_spec(tmp_path)
    assert "pip install" not in str(caught.value), "advice of transformers about itself"
    with pytest.raises(TargetError, match="is refused"):
        read_target_spec(edited(num_hidden_layers="eight"))


def test_a_kind_without_attention_heads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 32, "vocab_size": 50}')
    with pytest.raises(TargetError, match="does not say num_attention_heads"):
        read_target_spec(tmp_path)


def test_code_in_the_directory_does_not_run_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    marker = tmp_path / "ran"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}})
    )
    (tmp_path / "configuration_own.py").write_text(
        "import pathlib\nfrom transformers import PreTrainedConfig\n"
        f"pathlib.Path({str(marker)!r}).touch()\n"
        "class OwnConfig(PreTrainedConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(TargetError, match=r"read it, then set target\.trust_remote_code=true"):
        load_target_config(tmp_path)
    assert not marker.exists()
    config = load_target_config(tmp_path, trust_remote_code=True)
    assert marker.exists()
    assert isinstance(config, PreTrainedConfig)
