"""The check that text ends with the target's turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchspec.backends.conformance.capture import START
from torchspec.backends.conformance.subject import Subject
from torchspec.core.conformance.checks import Check
from torchspec.core.data.tokenizer import load_tokenizer

NEW = 10
LAST = 4
"""Tokens of the turn's end that the engine writes, if the target is sure of them."""

SEARCHED = 64
"""Tokens after which a text that has not ended is given up."""

_QUESTIONS = ("Say yes.", "Thank you!", "What is 2 plus 2?")


def ending(subject: Subject) -> str:
    """Where the target ends its turn, greedy text ends, with the end-of-turn token in it."""
    found = next(_ends(subject), None)
    if found is None:
        return f"no end of turn found within {SEARCHED} tokens of any prompt tried"
    prompt, wanted = found
    (text,) = subject.engine().generate([prompt], max_new_tokens=NEW)
    assert text == wanted, f"the target ends its turn with {wanted}; the text after the same tokens is {text}"
    return f"{len(wanted)} tokens to the end of the turn after {len(prompt)}"


def _ends(subject: Subject) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts with the target's greedy text to the end of its turn, each token beyond doubt."""
    for prompt in (*_chats(subject), *subject.prompts(SEARCHED)):
        text = subject.oracle.turn(prompt, SEARCHED, subject.target.eos_token_ids)
        if text is None:
            continue
        sure = _sure(subject, prompt, text)
        if sure:
            yield [*prompt, *text[:-sure]], text[-sure:]


def _sure(subject: Subject, prompt: list[int], text: list[int]) -> int:
    """How many of the text's last tokens, at most LAST, rounding cannot make others."""
    logits_TV = subject.oracle.of([*prompt, *text]).logits_TV[len(prompt) - 1 : -1].double()
    top_T2 = logits_TV.topk(2, dim=-1).values
    sure_T = ((top_T2[:, 0] - top_T2[:, 1]) / logits_TV.std(-1) > subject.allowance).tolist()
    last = sure_T[::-1][:LAST]
    return last.index(False) if False in last else len(last)


def _chats(subject: Subject) -> list[list[int]]:
    """Questions as the target's template puts them; none where it has none."""
    if not (subject.path / "tokenizer_config.json").is_file():
        return []
    tokenizer: Any = load_tokenizer(subject.path, trust_remote_code=subject.setting.trust_remote_code)
    if not tokenizer.chat_template:
        return []
    told = {"add_generation_prompt": True, "return_dict": False}
    return [
        list(tokenizer.apply_chat_template([{"role": "user", "content": question}], **told)) for question in _QUESTIONS
    ]


ENDING = (Check("text: the end of a turn", ending, START),)
