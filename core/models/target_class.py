"""Which class of transformers a target is, whichever of its automatic ones knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def target_class(config: PreTrainedConfig) -> Any:
    """`AutoModelForCausalLM`, or `AutoModelForImageTextToText` where the checkpoint's class is among those alone.

    Some multimodal configurations are known to both, the former building the language model alone; what the checkpoint
    itself names decides. A multimodal class without a base model below its head (Llama 4) is passed over: features at
    images could not be captured from it, and the language model inside it is one that can be decoded.
    """
    # Seconds, which processes that read no target do without.
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind, named = type(config), next(iter(config.architectures or ()), None)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        alone: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
        whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]
        if named == alone.__name__ or (kind in MODEL_MAPPING and MODEL_MAPPING[kind] is whole):
            return AutoModelForCausalLM
    return AutoModelForImageTextToText
