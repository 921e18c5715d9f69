"""Targets of many families: read, captured, decoded, against transformers' own model of the same directory.

Tolerances as in test_capture and test_session; the head is compared in float64, where rounding is below 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cohere2Config,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GptOssConfig,
    Kimi_K25Config,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlavaConfig,
    Mistral3Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

from torchspec.backends.api import CaptureRequest
from torchspec.backends.hf.engine import HfEngine
from torchspec.core import registry
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.models.target_head import load_target_head, load_target_head_shard
from torchspec.core.models.target_spec import read_target_spec

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
WINDOWS: dict[str, Any] = {"sliding_window": 8}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 32,
}
LLAMA4: dict[str, Any] = {**SIZES, "intermediate_size_mlp": 48, "num_local_experts": 2}
LLAMA4_TOWER: dict[str, Any] = {**TOWER, "intermediate_size": 128}
GEMMA4: dict[str, Any] = {
    **{**SIZES, **WINDOWS, "num_hidden_layers": 4, "final_logit_softcapping": 5.0, "attention_k_eq_v": True},
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    **{"num_global_key_value_heads": 1, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
}
"""Its full layers have fewer and wider key heads, which are their values as well."""
GEMMA4_TOWER: dict[str, Any] = {**TOWER, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 1}
PROJECTOR: dict[str, Any] = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}

FAMILIES: list[PreTrainedConfig] = [
    Qwen3MoeConfig(**SIZES, **MOE),
    MixtralConfig(**SIZES, num_local_experts=4),
    DeepseekV3Config(**{**SIZES, **MLA}),
    GptOssConfig(**SIZES, **WINDOWS, num_local_experts=4, num_experts_per_tok=2),  # experts with biases, sinks
    Gemma3TextConfig(**SIZES, **WINDOWS, query_pre_attn_scalar=8),  # tied, scales its embedding
    Llama4TextConfig(**LLAMA4),
    Llama4Config(text_config=LLAMA4, vision_config={**LLAMA4_TOWER, **PROJECTOR}),
    Cohere2Config(**SIZES, **WINDOWS, logit_scale=0.3),
    Gemma3Config(text_config={**SIZES, **WINDOWS}, vision_config=TOWER, mm_tokens_per_image=4),
    Gemma4TextConfig(**GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16),
    Gemma4Config(text_config=GEMMA4, vision_config=GEMMA4_TOWER),
    Kimi_K25Config(text_config={**SIZES, **MLA}, vision_config={**TOWER, "pos_emb_height": 4, "pos_emb_width": 4}),
    Qwen2_5_VLConfig(text_config={**SIZES, **MROPE}, vision_config={**QWEN_TOWER, "fullatt_block_indexes": [1]}),
    Qwen3VLMoeConfig(
        text_config={**SIZES, **MOE, **MROPE}, vision_config={**QWEN_TOWER, "deepstack_visual_indexes": [0]}
    ),
    LlavaConfig(
        text_config={"model_type": "llama", **SIZES}, vision_config={"model_type": "clip_vision_model", **TOWER}
    ),
    Mistral3Config(  # a norm in its projector, too
        text_config={"model_type": "mistral", **SIZES},
        vision_config={"model_type": "pixtral", **TOWER},
    ),
]
EXPERTS = {"experts_implementation": "eager"}
"""Grouped products of experts know no float64."""


@pytest.fixture(params=FAMILIES, ids=lambda config: config.model_type)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A directory with a random model, its norms and biases off their defaults; and the class that loads it."""
    config = request.param
    multimodal = hasattr(config, "vision_config")
    loader: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    torch.manual_seed(3)
    model = loader.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    return tmp_path, loader


def load(path: Path, loader: Any, **options: Any) -> Any:
    """What transformers itself makes of the directory. Llama 4's own class fails at texts, the language model inside
    does not."""
    model = loader.from_pretrained(path, **options).eval()
    return model.language_model if isinstance(model, Llama4ForConditionalGeneration) else model


def of_whole(model: Any, ids: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    return tuple(hidden[0] for hidden in output.hidden_states), output.logits[0]


def test_a_target_is_read_captured_and_decoded(saved: tuple[Path, Any], load_hf: Callable[..., HfEngine]) -> None:
    path, loader = saved
    engine = load_hf(path)
    model = load(path, loader)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 280, (19,), generator=generator).tolist()
    hidden, logits = of_whole(model, ids)

    spec = read_target_spec(path)
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (4, 32, 300)
    assert engine.describe() == spec

    sink = MemoryStore()
    batch = [CaptureRequest(record_id="long", input_ids=ids), CaptureRequest(record_id="short", input_ids=ids[:7])]
    for ref in engine.capture(batch, (0, 2, 1), sink):
        features = take(sink, ref)  # type: ignore[arg-type]
        length = len(features.input_ids_T)
        for column, tap in enumerate((0, 2, 1)):
            torch.testing.assert_close(features.taps_TNH[:, column], hidden[tap + 1][:length], atol=2e-5, rtol=0)
        torch.testing.assert_close(features.last_TH, hidden[-1][:length], atol=2e-5, rtol=0)

    # Steps with tokens that are taken back, as in speculative decoding.
    session = engine.open([ids[:10]], (1,))
    torch.testing.assert_close(session.prefill.logits_BV[0], logits[9], atol=1e-4, rtol=0)
    session.step(torch.tensor([[*ids[10:13], 5, 6]]))
    session.rollback(torch.tensor([2]))
    session.step(torch.tensor([[*ids[13:15], 7]]))
    session.rollback(torch.tensor([1]))
    output = session.step(torch.tensor([ids[15:]]))
    torch.testing.assert_close(output.logits_BnV[0], logits[15:], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.taps_BnNH[0, :, 0], hidden[2][15:], atol=2e-5, rtol=0)

    # Greedy text, against a loop without any cache.
    said: list[int] = []
    while len(said) < 6 and 2 not in said:
        said.append(int(of_whole(model, ids + said)[1][-1].argmax()))
    assert engine.generate([ids], max_new_tokens=6) == [said]


def test_its_head_is_exact(saved: tuple[Path, Any]) -> None:
    path, loader = saved
    whole = load(path, loader, dtype=torch.float64, **EXPERTS)
    options: Any = {"dtype": torch.float64, "device": torch.device("cpu")}
    head = load_target_head(path, **options)
    seen: list[Tensor] = []
    (layers,) = (each for each in whole.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == 4)
    layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    hidden, logits = of_whole(whole, list(range(3, 20)))
    last_TH = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    last_TH = last_TH.reshape(-1, 32)
    # Not every norm computes in float64: those that go through float32 round there.
    torch.testing.assert_close(head.normed(last_TH, "pre_norm"), hidden[-1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(head.logits(hidden[-1]), logits, atol=1e-12, rtol=1e-12)
    # Raw, without the factor with which some targets scale it: so vLLM and SGLang hand it to a draft.
    assert torch.equal(head.embedding_VH, whole.get_input_embeddings().weight)
    group = torch.distributed.ProcessGroup(1, 3)
    shards = VocabularyShards(group=group, communication=registry.load_device("cpu").communication, target_size=300)
    part = load_target_head_shard(path, shards, **options)
    assert torch.equal(part.shard_VH, head.head_VH[100:200])
    assert torch.equal(part.embedding_VH, head.embedding_VH)
