"""The tiny targets load with stock transformers and their template marks what the assistant says."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("name", ["tiny_target", "tiny_llama"])
def test_tiny_target_loads(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    supervised = [t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(supervised) == "yes<|im_end|>"
    assert model.config.num_hidden_layers == 8
