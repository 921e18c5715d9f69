"""Every form of row and every sort of bad one, with its place and a reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.core.data import readers
from torchspec.core.data.messages import RowError
from torchspec.core.data.rows import BadRow, ChatRow, RowReader, TextRow, TokenRow, parse_row, read_rows
from torchspec.core.errors import DataError

WriteRows = Callable[..., Path]
FILE = Path("data.jsonl")
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(path: Path) -> list[Any]:
    return list(read_rows([path]))


def test_openai_and_sharegpt_rows_are_the_same(write_rows: WriteRows) -> None:
    system = {"role": "system", "content": "s"}
    tool = {"role": "tool", "content": "t"}
    openai = {"id": 7, "messages": [system, USER, ASSISTANT, tool, ASSISTANT]}
    sharegpt = {
        "id": "7",
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
            {"from": "tool", "value": "t"},
            {"from": "GPT", "value": "a"},
        ],
    }
    first, second = read(write_rows([openai, sharegpt]))
    assert isinstance(first, ChatRow)
    assert first.messages == second.messages == (system, USER, ASSISTANT, tool, ASSISTANT)
    assert (first.sample_id, second.sample_id) == ("7", "7")
    assert (first.line, second.line) == (1, 2)


def test_content_as_parts_and_reasoning_fields(write_rows: WriteRows) -> None:
    parts = [{"type": "text", "text": "one "}, {"text": "two"}, " three"]
    thinking = {"role": "assistant", "content": "a", "reasoning_content": "hm", "weight": 1, "tool_calls": None}
    (row,) = read(write_rows([{"messages": [{"role": "user", "content": parts}, thinking]}]))
    assert row.messages[0]["content"] == "one two three"
    assert row.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}


def test_tools_and_calls(write_rows: WriteRows) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": None}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "f", "arguments": "{x"}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call, broken]}]
    as_list, as_text = read(write_rows([{"messages": messages, "tools": t} for t in (tools, json.dumps(tools))]))
    assert as_list.tools == as_text.tools == ({"type": "function", "function": {"name": "f"}},)
    assert as_list.messages[1]["content"] == ""
    arguments = [made["function"]["arguments"] for made in as_list.messages[1]["tool_calls"]]
    assert arguments == [{"x": 1}, "{x"]


def test_text_and_token_rows(write_rows: WriteRows) -> None:
    rows = [
        {"text": "<s>x"},
        {"input_ids": [1, 2], "loss_mask": [0, True]},
        # What regeneration writes: the very tokens count, not the messages that they were rendered from.
        {"messages": [USER, ASSISTANT], "input_ids": [1, 2], "loss_mask": [0, 1]},
        {"messages": [USER, ASSISTANT], "input_ids": [1, 2], "text": "t"},
    ]
    text, tokens, both, chat = read(write_rows(rows))
    assert text == TextRow(sample_id="rows.jsonl:1", file=text.file, line=1, text="<s>x")
    assert isinstance(tokens, TokenRow)
    assert isinstance(both, TokenRow)
    assert isinstance(chat, ChatRow)
    assert tokens.input_ids == both.input_ids == (1, 2)
    assert tokens.loss_mask == (0, 1)


BAD: list[tuple[Any, str]] = [
    ("[1, 2", "not valid JSON: Expecting ',' delimiter at column 6"),
    ("{'id': 1}", "not valid JSON"),
    ('{"text": "a"} trailing', "not valid JSON: Extra data"),
    ("[" * 100_000, "nested too deeply"),
    ('"text"', "a row must be an object, this is a text"),
    ([USER], "a row must be an object, this is a list"),
    ("null", "a row must be an object, this is missing"),
    ({}, "no conversation in it: needs messages, conversations, text, or input_ids with loss_mask (has none)"),
    ({"prompt": "x", "messages": None}, "(has prompt)"),
    ({"messages": "hello"}, "messages must be a list of messages, it is a text"),
    ({"conversations": []}, "conversations is empty"),
    ({"messages": [USER, "a"]}, "message 2: must be an object, it is a text"),
    ({"messages": [{"content": "x"}]}, "message 1: no role"),
    ({"messages": [{"role": "king", "content": "x"}]}, "message 1: unknown role 'king': one of system"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role ['user']"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 2: the assistant message has no content"),
    ({"conversations": [{"from": "gpt"}]}, "message 1: the gpt message has no value"),
    ({"messages": [{"role": "user", "content": 5}]}, "content must be text, it is a number"),
    ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "content must be text, it is an object"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "x"}]}]},
        "content has a part of type 'input_audio': only text and images can be trained on",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}]}]},
        "message 1: the image https://a.b/c.png would have to be fetched",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": "x.png"}]}]},
        "message 2: the assistant message has an image: what a target says is text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "an image in content needs a path or a data: URI",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part of content must be text, it is missing"),
    ({"messages": [{**ASSISTANT, "reasoning": ["x"]}]}, "reasoning must be text, it is a list"),
    ({"messages": [{**ASSISTANT, "tool_calls": 5}]}, "tool_calls must be a list, it is a number"),
    ({"messages": [{**ASSISTANT, "tool_calls": [5]}]}, "a tool call must be an object"),
    ({"messages": [{**ASSISTANT, "tool_calls": [{"function": {}}]}]}, "a tool call has no function name"),
    ({"messages": [{"from": "function_call", "value": "go()"}]}, "a function call is text that is not JSON"),
    ({"messages": [USER, ASSISTANT], "tools": "{"}, "tools is text that is not JSON"),
    ({"messages": [USER, ASSISTANT], "tools": {"name": "f"}}, "tools must be a list of objects"),
    ({"text": ["a"]}, "text must be text, it is a list"),
    ('{"text": "\\ud83d"}', "text is not valid Unicode"),
    ({"text": "a", "id": {"x": 1}}, "id must be a text or a number, this is an object"),
    ({"input_ids": [1, 2]}, "input_ids without loss_mask"),
    ({"input_ids": [], "loss_mask": []}, "input_ids is empty"),
    ({"input_ids": "12", "loss_mask": [1]}, "input_ids must be a list, it is a text"),
    ({"input_ids": [1, 2], "loss_mask": [1]}, "input_ids has 2 entries, loss_mask 1"),
    ({"input_ids": [1, "2"], "loss_mask": [1, 1]}, "input_ids must hold integers only, one entry is a text"),
    ({"input_ids": [1, 2], "loss_mask": [1, -100]}, "loss_mask must hold 0 and 1 only, it holds -100"),
    ({"input_ids": [1, 2], "loss_mask": [1, 0.5]}, "loss_mask must hold integers only, one entry is a number"),
]


def test_bad_rows_have_place_and_reason_and_stop_nothing(write_rows: WriteRows) -> None:
    good = {"messages": [USER, ASSISTANT]}
    path = write_rows([item for row, _ in BAD for item in (row, good)])
    rows = read(path)
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.line for row in bad] == list(range(1, 2 * len(BAD), 2))
    assert sum(isinstance(row, ChatRow) for row in rows) == len(BAD)
    for row, (_, reason) in zip(bad, BAD, strict=True):
        assert reason in row.reason
        assert str(row).startswith(f"{path}:{row.line}: ")


def test_undecodable_bytes_cost_one_row(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "caf\xe9"}\r\n{"text": "caf\xc3\xa9"}')
    first, second, third = read(path)
    assert (first.text, third.text, third.line) == ("a", "café", 4)
    assert (second.line, second.reason[:25]) == (3, "text is not valid Unicode")


def test_json_array_reports_lines_and_goes_on_behind_a_malformed_element(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        '[\n {"text": "one"},\n {"text": "a" "b": {"}": 1}},\n 12,\n nonsense, {"text": "two\\n]"}\n,\n'
        '{"text":\n "three"}]\n'
    )
    rows = read(path)
    assert [(type(row).__name__, row.line) for row in rows] == [
        ("TextRow", 2),
        ("BadRow", 3),
        ("BadRow", 4),
        ("BadRow", 5),
        ("TextRow", 5),
        ("TextRow", 7),
    ]
    assert [row.text for row in rows if isinstance(row, TextRow)] == ["one", "two\n]", "three"]


@pytest.mark.parametrize(
    ("text", "kinds", "reason"),
    [
        ('[{"text": "a"}', "TB", "the file ends before its list does"),
        ('[{"text": "a"}, {"text": "b', "TBB", "nothing behind it could be read"),
        ('[{"text": "a"}] {"text": "b"}', "TB", "text after the end of the list"),
        ('{"text": "a"}\n{"text": "b"}\n{x}\n', "TTB", "not valid JSON"),
        ('{\n "text": "a"}\n{"text":\n "b"} }', "TTB", "not valid JSON"),
        ('{"messages": [}', "B", "not valid JSON"),
    ],
)
def test_json_files_of_other_shapes(tmp_path: Path, text: str, kinds: str, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    rows = read(path)
    assert "".join(type(row).__name__[0] for row in rows) == kinds
    assert any(reason in row.reason for row in rows if isinstance(row, BadRow))


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(elements=st.lists(values, max_size=8), chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]))
def test_json_array_streams_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, elements: list[Any], chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("json") / "rows.json"
    path.write_text(json.dumps(elements, indent=indent, ensure_ascii=False))
    text = path.read_bytes().decode()
    read_bytes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK", chunk)
        found = list(readers.read_values(path, read_bytes.append))
    assert [item.value for item in found if isinstance(item, readers.Decoded)] == elements
    assert len(found) == len(elements)
    if elements:
        assert sum(read_bytes) == len(text.encode())
    if indent:
        lines = text.split("\n")  # not splitlines: strings may hold other line ends, such as U+0085
        assert all(lines[item.line - 1].strip()[:1] == json.dumps(item.value)[:1] for item in found)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {"messages": [USER, {**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        {"messages": [USER, ASSISTANT], "id": "x"},
        {"messages": [{"role": "king", "content": "c"}]},
        {"input_ids": [1, 2], "loss_mask": [0, 1]},
        {"text": "t"},
    ]
    path = tmp_path / "rows.parquet"
    names = {name for row in rows for name in row}
    parquet.write_table(pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    reader = RowReader([path])
    called, chat, bad, tokens, text = reader
    assert isinstance(called, ChatRow)
    assert called.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert isinstance(chat, ChatRow)
    assert chat.messages == (USER, ASSISTANT)
    assert (chat.sample_id, called.sample_id) == ("x", "rows.parquet:1")
    assert isinstance(bad, BadRow)
    assert bad.line == 3
    assert isinstance(tokens, TokenRow)
    assert isinstance(text, TextRow)
    assert reader.bytes_read == reader.total_bytes == path.stat().st_size


def test_parquet_that_is_none_or_damaged(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 this is something else PAR1")
    with pytest.raises(DataError, match=r"rows.parquet is not a readable Parquet file"):
        read(path)
    parquet.write_table(pyarrow.table({"text": [f"some text {n}" for n in range(5000)]}), path, row_group_size=1000)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = b"\xff" * 64
    path.write_bytes(data)
    rows = read(path)
    assert isinstance(rows[0], TextRow)
    assert isinstance(rows[-1], BadRow)
    assert "damaged Parquet data, the rest of the file cannot be read" in rows[-1].reason


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'torchspec\[parquet\]'"):
        read(path)


def test_unusable_files_are_named_all_at_once(tmp_path: Path) -> None:
    names = ("missing.jsonl", "empty.jsonl", "blank.json", "folder.jsonl", "rows.csv", "rows.jsonl.gz")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.json").write_text(" \n\n")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "rows.jsonl.gz").write_text("x")
    with pytest.raises(DataError) as caught:
        read_rows([tmp_path / name for name in names])
    message = str(caught.value)
    for name, reason in zip(
        names,
        ("does not exist", "is empty", "is empty", "is not a file", "unknown kind (.csv)", "unknown kind (.gz)"),
        strict=True,
    ):
        assert any(name in line and reason in line for line in message.splitlines())
    with pytest.raises(DataError, match="no data file was given"):
        read_rows([])


@pytest.mark.parametrize("text", ["[]", "[\n]\n"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rows.json holds no rows"):
        read(path)


def test_reading_is_lazy(write_rows: WriteRows) -> None:
    path = write_rows([{"text": "x" * 1000}] * 5000)
    reader = RowReader([path])
    next(iter(reader))
    assert 0 < reader.bytes_read < reader.total_bytes // 100


@pytest.mark.parametrize("given_id", ["", None])
def test_rows_without_an_id_are_named_by_their_place(given_id: Any) -> None:
    assert parse_row({"text": "x", "id": given_id}, FILE, 12).sample_id == "data.jsonl:12"


def test_a_row_is_refused_with_a_row_error() -> None:
    with pytest.raises(RowError):
        parse_row(5, FILE, 1)
