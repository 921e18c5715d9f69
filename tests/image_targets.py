"""Random targets of vision and language with their processors, as publishers save them, and images to show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BatchFeature,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 31)) -> Path:
    """Noise of this size, (width, height)."""
    values_HWC = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(values_HWC.to(torch.uint8).numpy()).save(path)
    return path


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


def jolted(model: PreTrainedModel) -> PreTrainedModel:
    """With nothing left at zero: a fresh projector would let no image through."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def save_llava(directory: Path, geometry: dict[str, Any]) -> Path:
    """An image is 4 tokens, and its template knows contents in parts alone."""
    torch.manual_seed(2)
    vision = {"model_type": "clip_vision_model", **TOWER, "projection_dim": 32}
    text = {"model_type": "llama", **geometry}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=3, image_seq_length=4)
    jolted(LlavaForConditionalGeneration(config)).save_pretrained(directory)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        make_tokenizer(PARTS_TEMPLATE, {"image_token": "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PARTS_TEMPLATE,
    )
    processor.save_pretrained(directory)
    return _with_published_names(directory)


def save_gemma3(directory: Path, geometry: dict[str, Any]) -> Path:
    """An image is 4 tokens that see each other, between others; it has windows, and ties its head."""
    torch.manual_seed(6)
    text = {**geometry, "sliding_window": 16, "query_pre_attn_scalar": 16}
    tokens = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    places = {"boi_token_index": 3, "image_token_index": 4, "eoi_token_index": 5}
    tower = {**TOWER, "vision_use_head": False}  # as published ones
    config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, **places)
    jolted(Gemma3ForConditionalGeneration(config)).save_pretrained(directory)
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        make_tokenizer(MIXED_TEMPLATE, tokens),
        image_seq_length=4,
        chat_template=MIXED_TEMPLATE,
    )
    processor.save_pretrained(directory)
    return _with_published_names(directory)


def _with_published_names(directory: Path) -> Path:
    """transformers 5.24 saves towers without a level that published checkpoints have, and that engines look for."""
    path = directory / "model.safetensors"
    towers = {
        name.replace("vision_tower.", "vision_tower.vision_model.") if "vision_model" not in name else name: value
        for name, value in load_file(path).items()
    }
    save_file(towers, path, metadata={"format": "pt"})
    return directory


def save_qwen_vl(directory: Path, geometry: dict[str, Any]) -> Path:
    """Qwen2.5-VL: images of any size, an id 3 for each 28 pixels of height and width, in positions of 3 dimensions.

    Heads of hidden_size / num_attention_heads, in three sections.
    """
    torch.manual_seed(5)
    half = geometry["hidden_size"] // geometry["num_attention_heads"] // 2
    sections = [half // 4, half - half // 4 - half // 2, half // 2]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
    text = {**{name: value for name, value in geometry.items() if name != "head_dim"}, "rope_parameters": rope}
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
        "out_hidden_size": geometry["hidden_size"], "fullatt_block_indexes": [1],
    }  # fmt: skip
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **dict(zip(tokens, range(3, 7), strict=True)))
    jolted(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(directory)
    make_tokenizer(MIXED_TEMPLATE, QWEN_TOKENS).save_pretrained(directory)
    names = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    described = {**QwenProcessor(3).image_processor.to_dict(), **names}
    (directory / "preprocessor_config.json").write_text(json.dumps(described))
    return directory


class QwenProcessor:
    """What Qwen2.5-VL's processor does with images; the real one cannot be made without a library for videos."""

    image_token = "<|image_pad|>"

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self.image_processor = Qwen2VLImageProcessorPil(patch_size=14, min_pixels=28 * 28, max_pixels=28 * 28 * 8)

    def __call__(self, text: list[str], images: list[Any], return_tensors: str) -> BatchFeature:
        pixels = self.image_processor(images, return_tensors="pt")
        ids = [[self.image_token_id] * int(pixels["image_grid_thw"].prod(-1).sum() // 4)]
        kinds = {"input_ids": torch.tensor(ids), "mm_token_type_ids": torch.ones_like(torch.tensor(ids))}
        return BatchFeature({**kinds, "attention_mask": torch.ones_like(torch.tensor(ids)), **pixels})

    def create_mm_token_type_ids(self, input_ids: list[list[int]]) -> list[list[int]]:
        return [[int(token == self.image_token_id) for token in ids] for ids in input_ids]
