"""Tiny targets with a real tokenizer and chat template, made once per test session."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Goes through the parts of a content without a look at what it is, as the templates of LLaVA do.
PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Takes text or parts; images stand where they are named, as in those of Gemma.
MIXED_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% elif m['content'] is string %}{{ m['content'] }}<|im_end|>\n"
    "{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str, images: dict[str, str]) -> PreTrainedTokenizerFast:
    """Byte-level, 300 entries: any text can be encoded, and merges exist. `images` are tokens by their roles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *images.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the quick brown fox returns the value of the function"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        extra_special_tokens=images,
    )


def save_tokenizer(directory: Path) -> None:
    make_tokenizer(CHAT_TEMPLATE, {}).save_pretrained(directory)


GEOMETRY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao, here and in processes that a test starts, from the folder in which ci/test keeps it apart."""
    folder = Path(sys.prefix) / "lowbit"
    if (folder / "torchao").is_dir():
        monkeypatch.syspath_prepend(folder)
        others = os.environ.get("PYTHONPATH")
        monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{others}" if others else str(folder))
    elif importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")


def beside(name: str) -> ModuleType:
    """A module in the folder of this file."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def quantised_targets() -> ModuleType:
    """quantised_targets.py."""
    return beside("quantised_targets")


@pytest.fixture(scope="session")
def published_drafts() -> ModuleType:
    """published_drafts.py."""
    return beside("published_drafts")


@pytest.fixture(scope="session")
def published_target(tmp_path_factory: pytest.TempPathFactory, published_drafts: ModuleType) -> Path:
    """What the drafts of published_drafts.py are for."""
    directory = tmp_path_factory.mktemp("targets") / "llama-3.1"
    published_drafts.save_target(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 8 layers with tied embeddings, float32."""
    directory = tmp_path_factory.mktemp("targets") / "qwen3"
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**GEOMETRY, tie_word_embeddings=True)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 8 layers with an untied head, float32."""
    directory = tmp_path_factory.mktemp("targets") / "llama"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**GEOMETRY, tie_word_embeddings=False)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3 of 8 layers: latent attention, YaRN, experts behind the first layer; float32."""
    directory = tmp_path_factory.mktemp("targets") / "deepseek"
    latent = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    experts = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    rope |= {"mscale": 0.8, "mscale_all_dim": 1.2}
    sizes = {name: size for name, size in GEOMETRY.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    torch.manual_seed(2)
    config = DeepseekV3Config(
        moe_intermediate_size=16, **sizes, **latent, **experts, rope_parameters=rope, tie_word_embeddings=False
    )
    DeepseekV3ForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _jolted(model: PreTrainedModel) -> PreTrainedModel:
    """With nothing left at zero: a fresh projector would let no image through."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA: an image is 4 tokens, and its template knows contents in parts alone."""
    directory = tmp_path_factory.mktemp("targets") / "llava"
    torch.manual_seed(2)
    vision = {"model_type": "clip_vision_model", **TOWER, "projection_dim": 32}
    text = {"model_type": "llama", **GEOMETRY}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=3, image_seq_length=4)
    _jolted(LlavaForConditionalGeneration(config)).save_pretrained(directory)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        make_tokenizer(PARTS_TEMPLATE, {"image_token": "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PARTS_TEMPLATE,
    )
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma-3: an image is 4 tokens that see each other, between others; it has windows, and ties its head."""
    directory = tmp_path_factory.mktemp("targets") / "gemma3"
    torch.manual_seed(4)
    text = {**GEOMETRY, "sliding_window": 16, "query_pre_attn_scalar": 16}
    tokens = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    places = {"boi_token_index": 3, "image_token_index": 4, "eoi_token_index": 5}
    config = Gemma3Config(text_config=text, vision_config=TOWER, mm_tokens_per_image=4, **places)
    _jolted(Gemma3ForConditionalGeneration(config)).save_pretrained(directory)
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        make_tokenizer(MIXED_TEMPLATE, tokens),
        image_seq_length=4,
        chat_template=MIXED_TEMPLATE,
    )
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """peak_bytes(work): the most that is alive of what `work` allocates."""

    def measure(work: Callable[[], object]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        alive = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            most = max(most, alive)
        return most

    return measure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", help="engines whose environments must be here (vllm,sglang): absence is a failure")
