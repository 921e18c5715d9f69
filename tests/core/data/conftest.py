"""A byte-level tokenizer with many merges across white space, small chat templates of the common kinds, and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|user|>",
    "<|assistant|>",
]

_LLAMA3_HEAD = "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"

TEMPLATES = {
    "generation": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    ),
    # the end of turn left out of the span, and the newline behind it taken in
    "generation_short": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>{{ '\n' }}"
        "{% else %}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    ),
    "generation_long": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    ),
    # a header that ends with spaces, which are a token of their own or part of the first word
    "generation_spaced": (
        "{% for m in messages %}{{ m['role'] + ':  ' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:  ' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for call in m.get('tool_calls', []) %}"
        "{% if m['content'] %}{{ '\n' }}{% endif %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
        "<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    ),
    # trims, opens with a token of its own, moves the system message's tools elsewhere, ends calls differently
    "llama3": (
        "<s>{% if tools %}"
        + _LLAMA3_HEAD.replace("{{ m['role'] }}", "tools")
        + "{{ tools | tojson }}<|eot_id|>{% endif %}"
        "{% for m in messages %}" + _LLAMA3_HEAD + "{{ m['content'] | trim }}"
        "{% if m.get('tool_calls') %}{{ m['tool_calls'][0]['function'] | tojson }}<|eom_id|>"
        "{% else %}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + _LLAMA3_HEAD.replace("{{ m['role'] }}", "assistant") + "{% endif %}"
    ),
    # drops reasoning from all turns but the last, to which it adds an empty block where there is none
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set c = m['content'] %}"
        "{% if m['role'] == 'assistant' %}{% set r = m.get('reasoning_content', '') %}"
        "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.last %}<think>{{ '\n' }}{{ r }}\n</think>{{ '\n\n' }}{% endif %}{% endif %}"
        "{{ c }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    ),
    # the same with the block opened by the generation prompt
    "thinking_prompt": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set c = m['content'] %}"
        "{% if m['role'] == 'assistant' %}"
        "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.last %}<think>{{ '\n' }}{{ r }}\n</think>{{ '\n\n' }}{% endif %}{% endif %}"
        "{{ c }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}<think>{{ '\n' }}{% endif %}"
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
        "{% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    # no end-of-turn token: the next role's token ends a turn
    "next_role": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    ),
}

_MERGE_TEXT = [
    "the quick brown fox returns the value of the function\n\n    return self.value\n\n\n  yes  no\n",
    "assistant\n\n\nuser\n\n  a\n\n :\n\n.\n\n  ,\n\n naïve café 日本語 😀😀\n\nASSISTANT: hello yes ",
] * 4


def _backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # As Llama 3 and GPT-2 have it: trims offsets, and would add a token in front.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)]),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_MERGE_TEXT, trainer)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return TEMPLATES


MakeTokenizer = Callable[[str | None], PreTrainedTokenizerBase]
WriteRows = Callable[..., Path]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """A tokenizer with the named template, or with the given text as its template, or with none."""
    serialised = _backend().to_str()
    end = {"llama3": "<|eot_id|>", "mistral": "</s>", "vicuna": "</s>", "next_role": "<|endoftext|>", "plain": None}

    def make(template: str | None) -> PreTrainedTokenizerBase:
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(serialised),
            bos_token="<s>",
            eos_token=end.get(template or "", "<|im_end|>"),
            pad_token="<|endoftext|>",
            chat_template=TEMPLATES.get(template or "", template),
        )

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows (text lines as they are, other values as JSON) to a JSON Lines file."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def chat() -> Callable[..., dict[str, Any]]:
    """A row from turns that alternate between user and assistant."""

    def make(*turns: str, **more: Any) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)], **more}

    return make
