"""A target directory without a usable tokenizer is told apart from one with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from torchspec.core.data.chat import RenderedText, Renderer
from torchspec.core.data.rows import ChatRow
from torchspec.core.data.tokenizer import (
    exact_backend,
    id_limit,
    load_tokenizer,
    template_digest,
    tokenizer_digest,
)
from torchspec.core.errors import TargetError


@pytest.fixture
def target(tiny_target: Path, tmp_path: Path) -> Path:
    """A copy of the tokenizer's files and the configuration that may be damaged."""
    for file in tiny_target.iterdir():
        if file.suffix in {".json", ".jinja"}:
            shutil.copy(file, tmp_path)
    return tmp_path


def test_the_tiny_target(target: Path) -> None:
    tokenizer = load_tokenizer(target)
    assert tokenizer.is_fast
    assert id_limit(tokenizer) == len(tokenizer) > 256


def test_template_override(target: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    own, other = load_tokenizer(target), load_tokenizer(target, chat_template=path)
    assert other.chat_template == path.read_text()
    assert template_digest(own) != template_digest(other)
    assert tokenizer_digest(own) == tokenizer_digest(other)


def test_missing_directory_and_missing_tokenizer(target: Path) -> None:
    with pytest.raises(TargetError, match="does not exist"):
        load_tokenizer(target / "nowhere")
    # transformers makes an empty tokenizer of config.json alone
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (target / name).unlink(missing_ok=True)
    with pytest.raises(TargetError, match=r"holds no tokenizer .*tokenizer\.json.*copy the target's tokenizer files"):
        load_tokenizer(target)
    (target / "config.json").unlink()
    with pytest.raises(TargetError, match="holds no tokenizer"):
        load_tokenizer(target)


def test_a_damaged_model_config_is_not_blamed_on_the_tokenizer(target: Path) -> None:
    (target / "config.json").write_text("{broken")
    with pytest.raises(TargetError, match=r"cannot be loaded: .*config\.json.* not a valid JSON file\.$"):
        load_tokenizer(target)


@pytest.mark.parametrize("text", ["{broken", json.dumps({"version": "1.0", "model": {"type": "Unheard"}})])
def test_damaged_tokenizer(target: Path, text: str) -> None:
    (target / "tokenizer.json").write_text(text)
    with pytest.raises(TargetError, match="cannot be loaded: "):
        load_tokenizer(target)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("{% for m in messages %}\n{% endif %}", "malformed at line 2"), (None, "cannot be read")],
)
def test_unusable_template_files(target: Path, tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "own.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TargetError, match=message):
        load_tokenizer(target, chat_template=path)


def test_digest_ignores_what_calls_leave_behind(target: Path) -> None:
    tokenizer = load_tokenizer(target)
    before = tokenizer_digest(tokenizer)
    tokenizer(["a b c", "a"], truncation=True, max_length=2, padding=True)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_digest(tokenizer) == before
    assert exact_backend(tokenizer).encode("the quick brown fox").ids == tokenizer("the quick brown fox")["input_ids"]
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_digest(tokenizer) != before


SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_thinking_is_switched_through_the_template(target: Path, tmp_path: Path) -> None:
    """The prompt says it, and so does everything that is identified by its template."""
    (tmp_path / "template.jinja").write_text(SWITCHED)
    made = {
        mode: load_tokenizer(target, chat_template=tmp_path / "template.jinja", thinking=mode)  # type: ignore[arg-type]
        for mode in ("auto", "on", "off")
    }
    row = ChatRow(sample_id="a", messages=({"role": "user", "content": "q"},), tools=None, file=tmp_path, line=1)
    texts = {}
    for mode, tokenizer in made.items():
        prompt = Renderer(tokenizer).prompt(row)
        assert isinstance(prompt, RenderedText)
        texts[mode] = prompt.text
    assert texts["auto"] == texts["on"] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert texts["off"] == texts["on"] + "<think>\n\n</think>\n\n"
    assert len({template_digest(tokenizer) for tokenizer in made.values()}) == 3
    with pytest.raises(TargetError, match=r"has no thinking mode \(neither enable_thinking nor thinking"):
        load_tokenizer(target, thinking="off")
