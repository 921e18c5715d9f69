"""Loss masks against a brute-force oracle: what each template writes, piece by piece, and the bytes of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from torchspec.core.data.chat import Rendered, RenderedText, Renderer, render
from torchspec.core.data.messages import RowError
from torchspec.core.data.rows import ChatRow, TextRow, TokenRow, parse_row
from torchspec.core.data.tokenizer import load_tokenizer
from torchspec.core.errors import TargetError

MakeTokenizer = Callable[[str | None], PreTrainedTokenizerBase]
Turn = tuple[str, str]
Piece = tuple[str, bool]  # text, supervised

FILE = Path("rows.jsonl")


def chat_row(turns: Sequence[Turn], **more: Any) -> ChatRow:
    row = parse_row({"messages": [{"role": role, "content": text} for role, text in turns], **more}, FILE, 1)
    assert isinstance(row, ChatRow)
    return row


# What each template of the fixture writes, said independently of it.


def chatml_pieces(turns: Sequence[Turn]) -> list[Piece]:
    pieces = []
    for role, text in turns:
        pieces += [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", role == "assistant"), ("\n", False)]
    return pieces


def spaced_pieces(turns: Sequence[Turn]) -> list[Piece]:
    return [
        piece for role, text in turns for piece in ((f"{role}:  ", False), (f"{text}<|im_end|>", role == "assistant"))
    ]


def llama3_pieces(turns: Sequence[Turn]) -> list[Piece]:
    pieces = [("<s>", False)]
    for role, text in turns:
        head = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
        pieces += [(head, False), (f"{text.strip()}<|eot_id|>", role == "assistant")]
    return pieces


def thinking_pieces(turns: Sequence[Turn], *, prompt: str = "") -> list[Piece]:
    pieces = []
    for number, (role, text) in enumerate(turns, start=1):
        pieces.append((f"<|im_start|>{role}\n", False))
        block = ""
        if role == "assistant":
            thought, mark, answer = text.partition("</think>")
            thought, text = (thought.split("<think>")[-1].strip("\n"), answer.lstrip("\n")) if mark else ("", text)
            block = f"<think>\n{thought}\n</think>\n\n" if number == len(turns) else ""
        if block and prompt:
            pieces.append((prompt, False))
            block = block.removeprefix(prompt)
        pieces += [(f"{block}{text}<|im_end|>", role == "assistant"), ("\n", False)]
    return pieces


def mistral_pieces(turns: Sequence[Turn]) -> list[Piece]:
    pieces = [("<s>", False)]
    for role, text in turns:
        pieces.append((f"[INST] {text} [/INST]", False) if role == "user" else (f" {text}</s>", True))
    return pieces


def vicuna_pieces(turns: Sequence[Turn]) -> list[Piece]:
    pieces: list[Piece] = []
    for role, text in turns:
        pieces += [(f"USER: {text} ", False)] if role == "user" else [("ASSISTANT:", False), (f" {text}</s>", True)]
    return pieces


def next_role_pieces(turns: Sequence[Turn]) -> list[Piece]:
    pieces = []
    for number, (role, text) in enumerate(turns):
        after_answer = number > 0 and turns[number - 1][0] == "assistant"
        pieces += [(f"<|{role}|>", after_answer), ("\n", False), (text, role == "assistant")]
    return pieces


def plain_pieces(turns: Sequence[Turn]) -> list[Piece]:
    pieces = []
    for role, text in turns:
        pieces += [(f"### {role}:\n", False), (text, role == "assistant"), ("\n\n", False)]
    return pieces


PIECES: dict[str, Callable[[Sequence[Turn]], list[Piece]]] = {
    "generation": chatml_pieces,
    "generation_short": chatml_pieces,
    "generation_long": chatml_pieces,
    "generation_spaced": spaced_pieces,
    "chatml": chatml_pieces,
    "llama3": llama3_pieces,
    "thinking": thinking_pieces,
    "thinking_prompt": lambda turns: thinking_pieces(turns, prompt="<think>\n"),
    "mistral": mistral_pieces,
    "vicuna": vicuna_pieces,
    "next_role": next_role_pieces,
    "plain": plain_pieces,
}


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 as itself, the other bytes from U+0100 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    added = tokenizer.added_tokens_decoder.get(token)
    if added is not None:
        return added.content.encode()
    return bytes(_bytes_of_letters()[letter] for letter in tokenizer.convert_ids_to_tokens(token))


def expected_mask(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], pieces: Sequence[Piece]) -> list[bool]:
    """From the bytes of the tokens: supervised iff part of a supervised run and of nothing else but white space
    (spaces before the run, any after it)."""
    data = "".join(text for text, _ in pieces).encode()
    flags = [flag for text, flag in pieces for _ in text.encode()]
    mask, start = [], 0
    for token in ids:
        end = start + len(token_bytes(tokenizer, token))
        assert data[start:end] == token_bytes(tokenizer, token)
        inside = [at for at in range(start, end) if flags[at]]
        if inside:
            before, after = data[start : inside[0]], data[inside[-1] + 1 : end]
            mask.append(not before.strip(b" ") and not after.strip())
        else:
            mask.append(False)
        start = end
    assert start == len(data)
    return mask


TRICKY = (
    "",
    "a",
    "i",
    "user",
    "assistant",
    "yes",
    " leading",
    "trailing \n",
    "\n\nnewlines\n\n",
    "    return self.value\n\n    yes\n",
    "日本語 😀 naïve",
    "<think>\nthe fox\n</think>\n\nno",
    "<think>\n\n</think>\n\nyes",
    "it says: ### user",
    ".\n\n",
)
QUESTIONS = (*TRICKY, "say <|im_start|>assistant\nyes<|im_end|>\n exactly", "ASSISTANT: yes", "[/INST] no")
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), max_size=12)
conversations = st.lists(
    st.tuples(st.one_of(st.sampled_from(QUESTIONS), texts), st.one_of(st.sampled_from(TRICKY), texts)),
    min_size=1,
    max_size=4,
).map(lambda pairs: [turn for user, said in pairs for turn in (("user", user), ("assistant", said))])

_renderers: dict[str, Renderer] = {}


@pytest.mark.parametrize("style", PIECES)
@settings(max_examples=40, deadline=None)
@given(turns=conversations)
def test_mask_is_what_the_template_writes(make_tokenizer: MakeTokenizer, style: str, turns: list[Turn]) -> None:
    renderer = _renderers.setdefault(style, Renderer(make_tokenizer(style)))
    pieces = PIECES[style](turns)
    prepared = renderer.prepare(chat_row(turns))
    assert isinstance(prepared, RenderedText)
    assert prepared.text == "".join(text for text, _ in pieces)
    sample = renderer.encode([prepared])[0]
    plain = renderer.tokenizer(prepared.text, add_special_tokens=False)["input_ids"]
    assert sample.input_ids.tolist() == plain
    assert sample.loss_mask.tolist() == expected_mask(renderer.tokenizer, plain, pieces)


@pytest.mark.parametrize("style", ["generation", "generation_short", "generation_long", "chatml"])
def test_masked_tokens_decode_to_the_answers(make_tokenizer: MakeTokenizer, style: str) -> None:
    tokenizer = make_tokenizer(style)
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "the fox"), ("user", "and?"), ("assistant", "yes")]
    sample = render(chat_row(turns), tokenizer)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "the fox<|im_end|>yes<|im_end|>"


def test_tiny_target_gives_what_transformers_gives(tiny_target: Path) -> None:
    tokenizer = load_tokenizer(tiny_target)
    row = chat_row([("user", "the quick\n"), ("assistant", " value\n\n"), ("user", "x"), ("assistant", "é")])
    sample = render(row, tokenizer)
    theirs = tokenizer.apply_chat_template(list(row.messages), return_dict=True, return_assistant_tokens_mask=True)
    assert sample.input_ids.tolist() == theirs["input_ids"]
    assert sample.loss_mask.tolist() == [bool(flag) for flag in theirs["assistant_masks"]]


@pytest.mark.parametrize("style", ["generation", "chatml"])
@pytest.mark.parametrize(
    ("last_turn_only", "answers", "supervised"),
    [
        ("never", ["one", "<think>why</think>two"], "one<|im_end|><think>why</think>two<|im_end|>"),
        ("always", ["one", "two"], "two<|im_end|>"),
        ("auto", ["one", "two"], "one<|im_end|>two<|im_end|>"),
        ("auto", ["one", "<think>why</think>two"], "<think>why</think>two<|im_end|>"),
        ("auto", ["<think>why</think>one", "two"], "two<|im_end|>"),
        ("auto", ["one", "<think>\n\n</think>two"], "one<|im_end|><think>\n\n</think>two<|im_end|>"),
    ],
)
def test_last_turn_only(
    make_tokenizer: MakeTokenizer, style: str, last_turn_only: Any, answers: list[str], supervised: str
) -> None:
    tokenizer = make_tokenizer(style)
    turns = [turn for answer in answers for turn in (("user", "why"), ("assistant", answer))]
    sample = render(chat_row([*turns, ("user", "thanks")]), tokenizer, last_turn_only=last_turn_only)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == supervised


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_reasoning_field_makes_auto_take_the_last_turn(make_tokenizer: MakeTokenizer, field: str) -> None:
    tokenizer = make_tokenizer("thinking")
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one", field: "hm"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "two", field: "so"},
    ]
    sample = render(parse_row({"messages": messages}, FILE, 1), tokenizer, last_turn_only="auto")
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "<think>\nso\n</think>\n\ntwo<|im_end|>"


def test_a_question_that_quotes_a_whole_turn_is_not_supervised(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    turns = [("user", "repeat:<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"), ("assistant", "yes")]
    sample = render(chat_row(turns), tokenizer)
    ids = sample.input_ids.tolist()
    assert sample.loss_mask.tolist() == expected_mask(tokenizer, ids, chatml_pieces(turns))


def test_a_quoted_header_that_cannot_be_passed_by(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    """The template rewrites the question, so its end is not known; the answer still belongs to the last header."""
    rewriting = "[INST] {{ m['content'] | replace('no', 'NO') }}"
    tokenizer = make_tokenizer(templates["mistral"].replace("[INST] {{ m['content'] }}", rewriting))
    tokenizer.eos_token = "</s>"
    turns = [("user", "say [/INST] no"), ("assistant", "yes")]
    rewritten = [("user", "say [/INST] NO"), ("assistant", "yes")]
    sample = render(chat_row(turns), tokenizer)
    assert sample.loss_mask.tolist() == expected_mask(tokenizer, sample.input_ids.tolist(), mistral_pieces(rewritten))


@pytest.mark.parametrize(
    ("style", "supervised"),
    [
        ("chatml", 'look\n<tool_call>{"name": "get", "arguments": {"x": 1}}</tool_call><|im_end|>it is 1<|im_end|>'),
        ("llama3", 'look{"name": "get", "arguments": {"x": 1}}<|eom_id|>it is 1<|eot_id|>'),
    ],
)
def test_tool_calls_are_supervised_and_results_are_not(
    make_tokenizer: MakeTokenizer, style: str, supervised: str
) -> None:
    tokenizer = make_tokenizer(style)
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "get x"},
        {"role": "assistant", "content": "look", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "assistant", "content": "it is 1"},
    ]
    tools = [{"type": "function", "function": {"name": "get"}}]
    sample = render(parse_row({"messages": messages, "tools": tools}, FILE, 1), tokenizer)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == supervised


def test_text_without_content_but_with_a_call(make_tokenizer: MakeTokenizer) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "go"},
            {"from": "function_call", "value": '{"name": "go", "arguments": {}}'},
            {"from": "observation", "value": "gone"},
            {"from": "gpt", "value": "done"},
        ]
    }
    tokenizer = make_tokenizer("chatml")
    sample = render(parse_row(row, FILE, 1), tokenizer)
    expected = '<tool_call>{"name": "go", "arguments": {}}</tool_call><|im_end|>done<|im_end|>'
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == expected


def test_an_answer_the_template_rewrites_is_a_bad_row(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    shouting = templates["chatml"].replace("{{ m['content'] }}", "{{ m['content'] | replace('hey', 'HEY') }}")
    renderer = Renderer(make_tokenizer(shouting))
    renderer.prepare(chat_row([("user", "hey"), ("assistant", "fox")]))
    with pytest.raises(RowError, match=r"message 4 \(assistant\) is not found.*generation"):
        renderer.prepare(chat_row([("user", "hey"), ("assistant", "fox"), ("user", "x"), ("assistant", "hey")]))


def test_an_answer_the_template_drops_is_not_taken_from_the_next_one(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    dropping = templates["chatml"].replace("{% for m in messages %}", "{% for m in messages if m['content'] != 'x' %}")
    with pytest.raises(RowError, match="message 2"):
        Renderer(make_tokenizer(dropping)).prepare(
            chat_row([("user", "q"), ("assistant", "x"), ("user", "q"), ("assistant", "y")])
        )


def test_a_refusal_of_the_template_is_a_bad_row(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(RowError, match="the chat template refuses the conversation: only user and assistant"):
        Renderer(make_tokenizer("mistral")).prepare(chat_row([("system", "s"), ("user", "q"), ("assistant", "a")]))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no') }}", "cannot be used to find what the assistant says.*refuses.*no"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "puts nothing before an assistant's turn"),
        ("same for all", "does not render each message once"),
    ],
)
def test_templates_that_cannot_be_used(make_tokenizer: MakeTokenizer, template: str | None, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Renderer(make_tokenizer(template)).prepare(chat_row([("user", "q"), ("assistant", "a")]))


def test_a_developer_message_is_a_system_message_to_templates_that_know_none(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    row = chat_row([("developer", "d"), ("user", "q"), ("assistant", "a")])
    prepared = Renderer(make_tokenizer("chatml")).prepare(row)
    assert isinstance(prepared, RenderedText)
    assert prepared.text.startswith("<|im_start|>system\nd")
    knowing = "{# developer #}" + templates["chatml"]
    prepared = Renderer(make_tokenizer(knowing)).prepare(row)
    assert isinstance(prepared, RenderedText)
    assert prepared.text.startswith("<|im_start|>developer\nd")


def test_named_templates_are_chosen_by_the_tools(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = {"default": templates["chatml"], "tool_use": templates["llama3"]}
    renderer = Renderer(tokenizer)
    turns = [("user", "q"), ("assistant", "a")]
    for row, start in ((chat_row(turns), "<|im_start|>"), (chat_row(turns, tools=[{"name": "f"}]), "<s>")):
        prepared = renderer.prepare(row)
        assert isinstance(prepared, RenderedText)
        assert prepared.text.startswith(start)


def test_text_and_token_rows(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None)
    sample = render(TextRow(sample_id="t", file=FILE, line=1, text="<s>hello yes</s>"), tokenizer)
    assert tokenizer.decode(sample.input_ids) == "<s>hello yes</s>"
    assert sample.loss_mask.all()
    row = TokenRow(sample_id="t", file=FILE, line=1, input_ids=(5, 6, 7), loss_mask=(0, 1, 0))
    assert render(row, tokenizer).loss_mask.tolist() == [False, True, False]
    limit = Renderer(tokenizer).id_limit
    for wrong in (limit, -1):
        row = TokenRow(sample_id="t", file=FILE, line=1, input_ids=(5, wrong), loss_mask=(0, 1))
        with pytest.raises(RowError, match=f"token id {wrong} is outside the tokenizer's vocabulary of {limit}"):
            render(row, tokenizer)


def test_prompts(make_tokenizer: MakeTokenizer) -> None:
    renderer = Renderer(make_tokenizer("chatml"))
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    for asked in (turns, turns[:3], turns[:1]):  # cut before the answer, or still waiting for one
        text = "".join(text for text, _ in chatml_pieces(asked if len(asked) % 2 else asked[:-1]))
        assert renderer.prompt(chat_row(asked)) == RenderedText(text=text + "<|im_start|>assistant\n", spans=())
    tokens = renderer.prompt(
        TokenRow(sample_id="", file=FILE, line=1, input_ids=(5, 6, 7, 8, 9, 10), loss_mask=(0, 1, 0, 1, 1, 0))
    )
    assert isinstance(tokens, Rendered)
    assert tokens.input_ids.tolist() == [5, 6, 7]
    for row in (
        TextRow(sample_id="", file=FILE, line=1, text="x"),
        TokenRow(sample_id="", file=FILE, line=1, input_ids=(5, 6), loss_mask=(1, 1)),
        chat_row([("assistant", "hello")]),
    ):
        with pytest.raises(RowError):
            renderer.prompt(row)


def test_half_a_surrogate_pair_in_a_tool_is_a_bad_row(make_tokenizer: MakeTokenizer) -> None:
    row = chat_row([("user", "q"), ("assistant", "a")], tools=[{"name": "\ud83d"}])
    with pytest.raises(RowError, match="not valid Unicode"):
        Renderer(make_tokenizer("llama3")).prepare(row)
