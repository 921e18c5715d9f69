"""Train the tokenizer of the embedded target: byte-level BPE of 2,048 entries with a chat template.

    python examples/embedded_target/train_tokenizer.py --output build/embedded_target/tokenizer

It reads the train split of the standard library alone (code and conversations). The result loads with
``AutoTokenizer.from_pretrained`` and no remote code.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from torchspec.core.data.stdlib_corpus import iter_conversations
from torchspec.core.data.stdlib_files import iter_files

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 2048

# A run of spaces before a word keeps one space for the word and is a token of its own before it, so
# an indentation is one token whatever follows. Digits are single: numbers are not worth entries here.
_PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+ *(?! )|\s+(?!\S)|\s+"

# The end of a turn is inside the generation span: a model trained on the spans learns to stop. The
# newline after it separates turns and is nobody's output.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def texts() -> Iterator[str]:
    """The train split: library code (no tests, whose literals would take entries), then conversations."""
    yield from (file.text for file in iter_files("train") if not file.is_test)
    for conversation in iter_conversations("train"):
        for message in conversation.messages:
            yield message["role"]  # so that the words of the template become single entries
            yield message["content"]


def train() -> PreTrainedTokenizerFast:
    """The trained tokenizer; its ids 0, 1, 2 are padding, start of turn, end of turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to save the tokenizer in")
    arguments = parser.parse_args()
    train().save_pretrained(arguments.output)
    print(f"tokenizer of {VOCABULARY} entries in {arguments.output}")


if __name__ == "__main__":
    main()
