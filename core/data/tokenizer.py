"""The target's tokenizer: loading it, and what identifies it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jinja2.exceptions import TemplateSyntaxError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from torchspec.core.errors import TargetError

_PROCESSOR_TEMPLATE = "chat_template.json"
"""Where older multimodal checkpoints keep the template, which their tokenizers then do not know."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


Thinking = Literal["auto", "on", "off"]

_THINKING = ("enable_thinking", "thinking")
"""Variables by which chat templates are told whether the target is to reason before it answers."""


def has_tokenizer(target: Path) -> bool:
    """Whether a directory has any file of a tokenizer."""
    return any((target / name).exists() for name in (*_TOKENIZER_FILES, "tokenizer_config.json"))


def load_tokenizer(
    target: Path, *, chat_template: Path | None = None, trust_remote_code: bool = False, thinking: Thinking = "auto"
) -> PreTrainedTokenizerBase:
    """The tokenizer stored in a target's directory, nothing else being consulted.

    `chat_template` is a Jinja file that replaces the tokenizer's own template. A tokenizer without any template
    is accepted here; rendering a conversation with it is the error. `thinking` switches a target's reasoning on or
    off through its template, and is part of the template from here on: whatever depends on the one does on the other.

    Raises TargetError for a template that knows of no such switch; when the directory holds no tokenizer, holds a
    damaged one, or one that cannot say which characters a token covers (the loss mask is made from those); and when the
    template is missing or malformed.
    """
    if not target.is_dir():
        raise TargetError(
            f"the target directory {target} does not exist: name a directory with a model and its tokenizer"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
        if not any((target / name).exists() for name in _TOKENIZER_FILES):
            raise _no_tokenizer(target, _TOKENIZER_FILES) from error
        raise TargetError(f"the tokenizer in {target} cannot be loaded: {_first_line(error)}") from error
    _check_files(target, tokenizer)
    if not tokenizer.is_fast:
        raise TargetError(
            f"the tokenizer in {target} ({type(tokenizer).__name__}) is a pure Python one and cannot map tokens to "
            "characters, which the loss mask needs: convert it to a tokenizer.json"
        )
    if tokenizer.chat_template is None and (target / _PROCESSOR_TEMPLATE).is_file():
        tokenizer.chat_template = _processor_template(target / _PROCESSOR_TEMPLATE)
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    if thinking != "auto":
        tokenizer.chat_template = _with_thinking(tokenizer.chat_template, target, on=thinking == "on")
    return tokenizer


def _with_thinking(template: str | dict[str, str] | None, target: Path, *, on: bool) -> str | dict[str, str]:
    """The template, or each of several, that sets its switch itself."""
    texts = list(template.values()) if isinstance(template, dict) else [template or ""]
    names = [name for name in _THINKING if any(re.search(rf"\b{name}\b", text) for text in texts)]
    if not names or template is None:
        raise TargetError(
            f"the chat template of {target} has no thinking mode (neither {' nor '.join(_THINKING)} occurs in it)\n"
            "    remedy: leave target.thinking (--thinking) at auto, or give a template that has one "
            "(target.chat_template, --chat-template)"
        )
    switch = "".join(f"{{%- set {name} = {str(on).lower()} -%}}" for name in names)
    return {name: switch + text for name, text in template.items()} if isinstance(template, dict) else switch + template


def read_chat_template(path: Path) -> str:
    """The text of a Jinja chat template; TargetError when it is missing, empty or malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise TargetError(f"the chat template {path} cannot be read: {why}") from error
    if not text.strip():
        raise TargetError(f"the chat template {path} is empty")
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise TargetError(f"the chat template {path} is malformed at line {error.lineno}: {error.message}") from error
    return text


def _processor_template(path: Path) -> str:
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"the chat template in {path} cannot be read: {type(error).__name__}: {error}") from error
    return str(template)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over everything that decides which ids a text gets: the serialised pipeline and the special tokens.

    Chat templates are not part of it; the padding and truncation state, which calls change, isn't either.
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    del pipeline["truncation"], pipeline["padding"]
    facts = [pipeline, tokenizer.special_tokens_map, bool(tokenizer.split_special_tokens)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template, or of all of them where a tokenizer names several."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()


def exact_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's pipeline whose offsets cover every character of a text.

    Post-processors add special tokens, which rendered text holds already, and trim spaces off the offsets, after
    which a token of spaces covers nothing. The ids are those of `tokenizer(text, add_special_tokens=False)`.
    """
    backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def id_limit(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id; `len(tokenizer)` unless ids have gaps."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def _check_files(target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # transformers builds an empty tokenizer of the model's class from config.json alone.
    wanted = sorted({"tokenizer.json", *type(tokenizer).vocab_files_names.values()})
    if not any((target / name).is_file() for name in wanted):
        raise _no_tokenizer(target, wanted)


def _no_tokenizer(target: Path, wanted: Sequence[str]) -> TargetError:
    return TargetError(
        f"the target directory {target} holds no tokenizer (none of {', '.join(wanted)}): "
        "copy the target's tokenizer files into it"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
