"""Quantised targets in the hf engine, against the same engine over float32 weights that are worth the same.

Both run the same kernels over the same numbers, so nothing may differ; the target before it was quantised does, a lot.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from torchspec.backends.api import CaptureRequest, Features, RecordRef, TargetError
from torchspec.backends.hf.engine import HfEngine
from torchspec.backends.hf.split_plan import SplitPlan
from torchspec.backends.hf.split_weights import read_part
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.registry import backends

TAPS = (0, 1)
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, PreTrainedConfig] = {
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, num_key_value_heads=2, head_dim=8, num_experts=4),
    "deepseek-v3": DeepseekV3Config(
        **SIZES, **EXPERTS, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=2, topk_group=1, n_shared_experts=1,
        first_k_dense_replace=1,
    ),
}  # fmt: skip
FORMS = ("fp8", "ct-fp8", "ct-w4a16-asym", "gptq-v2", "awq")


@pytest.fixture(scope="module")
def short(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama's first two layers."""
    copy = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("short") / "llama")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    tensors = load_file(copy / "model.safetensors")
    kept = [name for name in tensors if ".layers." not in name or name.split(".")[2] in ("0", "1")]
    save_file({name: tensors[name] for name in kept}, copy / "model.safetensors")
    return copy


def capture(engine: HfEngine) -> Features:
    """Of 17 tokens."""
    store = MemoryStore()
    request = CaptureRequest(record_id="a", input_ids=[(5 + 7 * n) % 300 for n in range(17)])
    (record,) = engine.capture([request], TAPS, store)
    assert isinstance(record, RecordRef)
    return take(store, record)


def assert_same(quantised: HfEngine, floats: HfEngine) -> None:
    found, expected = capture(quantised), capture(floats)
    assert torch.equal(found.taps_TNH, expected.taps_TNH)
    assert torch.equal(found.last_TH, expected.last_TH)
    prompts = [[5, 6, 7], [8, 9]]
    assert quantised.generate(prompts, max_new_tokens=6) == floats.generate(prompts, max_new_tokens=6)


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_with_what_the_weights_stand_for(
    form: str, short: Path, tmp_path: Path, load_hf: Callable[..., HfEngine], quantised_targets: ModuleType
) -> None:
    quantised, floats = quantised_targets.quantise(short, tmp_path, form)
    engine = load_hf(quantised)
    assert_same(engine, load_hf(floats))
    before, now = capture(load_hf(short)).last_TH, capture(engine).last_TH
    assert (before - now).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize("form", ["fp8", "ct-w4a16"])
@pytest.mark.parametrize("model", MODELS)
def test_experts_and_latent_attention(
    model: str, form: str, tmp_path: Path, load_hf: Callable[..., HfEngine], quantised_targets: ModuleType
) -> None:
    """Experts lie one by one in a checkpoint, and together in transformers' model."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(MODELS[model]).save_pretrained(tmp_path / model)
    quantised, floats = quantised_targets.quantise(tmp_path / model, tmp_path, form)
    names = TargetWeights.open(quantised).quantised
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    assert_same(load_hf(quantised), load_hf(floats))


def test_experts_in_four_bits(tmp_path: Path, load_hf: Callable[..., HfEngine], quantised_targets: ModuleType) -> None:
    torch.manual_seed(3)
    config = GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2)
    config.intermediate_size = 32
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt-oss")
    quantised, floats = quantised_targets.quantise(
        tmp_path / "gpt-oss", tmp_path, "mxfp4", chosen=lambda name: name.endswith("_proj")
    )
    assert "model.layers.1.mlp.experts.gate_up_proj" in TargetWeights.open(quantised).quantised
    assert_same(load_hf(quantised), load_hf(floats))


def test_quantised_ends_and_a_tied_head(
    tiny_target: Path, tmp_path: Path, load_hf: Callable[..., HfEngine], quantised_targets: ModuleType
) -> None:
    ends = ("model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight")
    quantised, floats = quantised_targets.quantise(tiny_target, tmp_path, "ct-w8a16", chosen=lambda name: name in ends)
    assert_same(load_hf(quantised), load_hf(floats))


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_cuts_its_part_of_the_whole(
    form: str, short: Path, tmp_path: Path, quantised_targets: ModuleType
) -> None:
    """Along either side, at places where neither blocks nor words end."""
    weights = TargetWeights.open(quantised_targets.quantise(short, tmp_path, form)[0])
    sides = {"layers.*.mlp.up_proj": 0, "layers.*.mlp.down_proj": 1, "layers.*.self_attn.q_proj": 0}
    nothing: Any = SimpleNamespace(sums=lambda module: False)
    plan = SplitPlan(spec=nothing, config=nothing, sides=sides, experts=(), ends=())
    parts = [read_part(weights, plan, rank, 5, torch.float32) for rank in range(5)]
    for name in weights.quantised:
        side = plan.side(name)
        whole = weights.read(name, dtype=torch.float32, device=torch.device("cpu"))
        each = [part[name][...] for part in parts]
        assert torch.equal(torch.cat(each, dim=side) if side is not None else each[4], whole)
        assert max(len(part) for part in each) < len(whole) or side != 0


def test_the_log_says_so(
    short: Path, tmp_path: Path, load_hf: Callable[..., HfEngine], quantised_targets: ModuleType,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO, logger="torchspec"):
        load_hf(quantised_targets.quantise(short, tmp_path, "fp8")[0])
    assert "is quantised (fp8, blocks of 40 x 24): the hf engine dequantises its weights" in caplog.text


def say(target: Path, directory: Path, quantisation: dict[str, Any]) -> Path:
    copy = shutil.copytree(target, directory)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return copy


@pytest.mark.parametrize(
    ("quantisation", "reason"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, r"gptq of 3 bits .*optimum"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "compressed"),
        ({"quant_method": "made-up"}, "made-up"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_what_cannot_run_is_refused_with_its_reason(
    quantisation: dict[str, Any], reason: str, short: Path, tmp_path: Path, load_hf: Callable[..., HfEngine]
) -> None:
    """Before anything is loaded, by the check of a configuration too."""
    target = say(short, tmp_path / "target", quantisation)
    examine = backends().spec("hf").examine
    assert examine is not None
    message = rf"is quantised .*{reason}.* Use another backend, such as vllm or sglang.*or dequantise it first"
    with pytest.raises(TargetError, match=message):
        examine(read_target_spec(target))
    with pytest.raises(TargetError, match=message):
        load_hf(target)


def test_codes_without_scales_never_run(short: Path, tmp_path: Path, load_hf: Callable[..., HfEngine]) -> None:
    """transformers would take them for the weights."""
    copy = shutil.copytree(short, tmp_path / "codes")
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, copy / "model.safetensors")
    with pytest.raises(
        TargetError, match=r"layers\.1\.mlp\.up_proj\.weight is stored as float8_e4m3fn, .*says nothing"
    ):
        load_hf(copy)
