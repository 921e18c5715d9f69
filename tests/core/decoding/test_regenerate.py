"""Regenerated conversations: exactly the target's tokens, every row accounted for, and the same file after any kill."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from torchspec.core.data.chat import render
from torchspec.core.data.rows import TokenRow, parse_row
from torchspec.core.decoding.regenerate import RegenerateSettings, regenerate
from torchspec.core.errors import DataError

Make = Callable[..., Any]
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_target)


@pytest.fixture
def target(make_target: Make) -> Any:
    """Answers of some ten random tokens: bytes that are no text among them, so re-encoding would give others."""
    target = make_target(8, vocab=296, eos=(EOS,), context=900)
    target.logits_MV[::9, EOS] = 10.0
    return target


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)], **more}


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def many(count: int) -> list[dict[str, Any]]:
    return [
        chat(*[f"text {at} {turn}" * (1 + at % 5) for turn in range(1 + at % 4)], id=f"c{at}") for at in range(count)
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_row(row: dict[str, Any], target: Any, tokenizer: Any) -> list[list[int]]:
    """Every supervised token is the target's greedy choice after exactly the tokens before it; -> the runs of them."""
    ids, mask = row["input_ids"], row["loss_mask"]
    assert len(ids) == len(mask)
    runs: list[list[int]] = []
    for at, (token, supervised) in enumerate(zip(ids, mask, strict=True)):
        if supervised:
            assert token == int(target.logits(ids[:at]).argmax())
            if not mask[at - 1]:
                runs.append([])
            runs[-1].append(token)
    return runs


def test_every_supervised_token_is_the_targets_own(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = [
        chat("a", "old", id="one"),
        chat("a", "old", "b", "old", "c", "old", id="three turns"),
        chat("a", "old", "waiting", id="waiting"),
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}], "id": "share"},
    ]
    output = tmp_path / "out" / "rows.jsonl"
    report = regenerate(target, tokenizer, [write_rows(tmp_path / "in.jsonl", data)], output, RegenerateSettings())
    rows = {row["id"]: row for row in read(output)}
    assert set(rows) == {"one", "three turns", "waiting", "share"}
    assert (report.read, report.ok, report.failed, report.skipped, report.cut) == (4, 4, 0, 0, 0)
    assert (report.turns, report.failures) == (7, None)
    assert report.tokens == sum(sum(row["loss_mask"]) for row in rows.values())
    for row in rows.values():
        runs = check_row(row, target, tokenizer)
        answers = [message for message in row["messages"] if message["role"] == "assistant"]
        assert len(answers) == len(runs) == row["metadata"]["turns"] == row["metadata"]["asked"]
        for message, run in zip(answers, runs, strict=True):
            assert run[-1] == EOS
            assert message["content"] == tokenizer.decode(run[:-1])
            assert message["content"] != "old"
        first = row["messages"][: [m["role"] for m in row["messages"]].index("assistant")]
        prompt = tokenizer.apply_chat_template(first, add_generation_prompt=True, return_dict=False)
        assert row["input_ids"][: len(prompt)] == prompt
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.decode(row["input_ids"]) == text.removesuffix("\n")
        assert row["metadata"]["finish"] == "eos"
    three = rows["three turns"]
    encoded = tokenizer(tokenizer.decode(three["input_ids"]), add_special_tokens=False)["input_ids"]
    assert encoded != three["input_ids"], "the case is too tame: encoding the text again gives the same tokens"


def test_training_takes_the_rows_as_they_are(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    regenerate(target, tokenizer, [write_rows(tmp_path / "in.jsonl", many(4))], output, RegenerateSettings())
    for line, value in enumerate(read(output), start=1):
        row = parse_row(value, output, line)
        assert isinstance(row, TokenRow)
        rendered = render(row, tokenizer)
        np.testing.assert_array_equal(rendered.input_ids, value["input_ids"])
        np.testing.assert_array_equal(rendered.loss_mask, np.array(value["loss_mask"], dtype=bool))


def test_every_row_is_accounted_for(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    caller = {"role": "assistant", "content": "", "tool_calls": [call]}
    rows = [
        chat("a", "old", id="same"),
        '{"messages": [',
        {"text": "plain"},
        {"input_ids": [1, 2], "loss_mask": [0, 1]},
        {"messages": [{"role": "assistant", "content": "first"}]},
        chat("long " * 900, "old"),
        chat("a", "old", id="same"),
        {"messages": [{"role": "user", "content": "q"}, caller]},
        {"messages": [{"role": "wizard", "content": "q"}]},
        {"messages": [{"role": "user", "content": "q"}, caller, {"role": "tool", "content": "42"}], "id": "tools"},
    ]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "rows.jsonl"
    calls: list[tuple[str, int, int]] = []
    report = regenerate(
        target,
        tokenizer,
        [source],
        output,
        RegenerateSettings(batch_size=1),
        progress=lambda *call: calls.append(call),
    )
    assert (report.read, report.ok, report.failed, report.skipped) == (10, 3, 7, 0)
    assert report.failures == tmp_path / "rows.jsonl.failed.jsonl"
    reasons = {entry["line"]: entry["reason"] for entry in read(report.failures)}
    assert sorted(reasons) == [2, 3, 4, 5, 6, 8, 9]
    for line, words in ((3, "not a conversation"), (4, "not a conversation"), (5, "nothing stands before"),
                        (6, "fills the target's context of 900"), (8, "calls a tool"), (9, "wizard")):  # fmt: skip
        assert words in reasons[line]
    assert [row["id"] for row in read(output)] == ["same", "same#2", "tools"]
    tools = read(output)[2]["messages"]
    assert [m["role"] for m in tools] == ["user", "assistant", "tool", "assistant"]
    assert tools[1]["tool_calls"][0]["function"]["name"] == "f"
    assert calls[-1] == ("generate", 10, 10)

    again = regenerate(target, tokenizer, [source], output, RegenerateSettings(batch_size=1))
    assert (again.read, again.ok, again.failed, again.skipped) == (10, 0, 7, 3)


def test_limits_end_a_conversation(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [chat("a", "", "b", "", "c", "", id="x")])
    output = tmp_path / "short.jsonl"
    report = regenerate(target, tokenizer, [source], output, RegenerateSettings(max_new_tokens=1))
    (row,) = read(output)
    assert (report.cut, report.turns, sum(row["loss_mask"])) == (1, 1, 1)
    assert (row["metadata"]["finish"], row["metadata"]["turns"], row["metadata"]["asked"]) == ("length", 1, 3)
    assert row["messages"][-1]["role"] == "assistant"
    check_row(row, target, tokenizer)

    long = tmp_path / "long.jsonl"
    regenerate(target, tokenizer, [source], long, RegenerateSettings())
    whole = read(long)[0]["input_ids"]
    for context in range(22, len(whole) + 8, 7):
        target.context = context
        output = tmp_path / f"{context}.jsonl"
        report = regenerate(target, tokenizer, [source], output, RegenerateSettings())
        (row,) = read(output)
        assert row["input_ids"] == whole[: len(row["input_ids"])]
        assert len(row["input_ids"]) <= context
        complete = row["input_ids"] == whole
        assert (row["metadata"]["finish"], report.cut) == (("eos", 0) if complete else ("context", 1))
        assert sum(row["loss_mask"]) > 0
        assert row["loss_mask"][-1] == 1


def test_a_token_that_the_tokenizer_lacks_ends_a_conversation(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Models have more rows than their tokenizer has tokens; text cannot hold those."""
    source, output = write_rows(tmp_path / "in.jsonl", many(6)), tmp_path / "rows.jsonl"
    target.logits_MV = torch.cat((target.logits_MV, target.logits_MV[:, :4] + 0.8), dim=1)
    report = regenerate(target, tokenizer, [source], output, RegenerateSettings())
    rows = read(output)
    assert report.ok == len(rows) == 6
    cut = [row for row in rows if row["metadata"]["finish"] == "vocabulary"]
    assert report.cut == len(cut) > 0
    for row in rows:
        assert max(row["input_ids"]) < 296
        check_row(row, target, tokenizer)
    for row in cut:
        assert int(target.logits(row["input_ids"]).argmax()) >= 296


def test_a_template_that_rewrites_history_gives_a_row_per_turn(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [chat("a", "", "b", "", "c", "", id="x"), chat("a", "", id="y")])
    forgetful = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    forgetful.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}<|im_end|>{% endgeneration %}",
        "{{ m['content'] if loop.last else 'earlier' }}<|im_end|>{% endgeneration %}",
    )
    output = tmp_path / "rows.jsonl"
    report = regenerate(target, forgetful, [source], output, RegenerateSettings())
    rows = read(output)
    assert (report.ok, report.turns) == (2, 4)
    assert [row["id"] for row in rows] == ["y", "x", "x~2", "x~3"]
    assert [(row["metadata"]["part"], row["metadata"]["parts"]) for row in rows[1:]] == [(1, 3), (2, 3), (3, 3)]
    for turn, row in enumerate(rows[1:], start=1):
        assert len(check_row(row, target, forgetful)) == 1
        assert len(row["messages"]) == 2 * turn
        assert forgetful.decode(row["input_ids"]).count("earlier") == turn - 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(
    target: Any, tokenizer: Any, tmp_path: Path, temperature: float
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many(11)), tmp_path / "rows.jsonl"
    request = RegenerateSettings(batch_size=4, temperature=temperature, max_new_tokens=40)
    assert regenerate(target, tokenizer, [source], output, request).ok == 11
    whole = output.read_bytes()
    ends = [at for at, byte in enumerate(whole) if byte == 10]
    for cut in sorted({0, 1, 8, 9, *range(0, len(whole), len(whole) // 12), *ends[::3], *(end + 1 for end in ends)}):
        output.write_bytes(whole[:cut])
        report = regenerate(target, tokenizer, [source], output, request)
        assert report.skipped == whole[:cut].count(b"\n")
        assert report.ok == 11 - report.skipped
        assert output.read_bytes() == whole


def test_rows_of_one_conversation_are_kept_together(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    forgetful = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    forgetful.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}<|im_end|>{% endgeneration %}",
        "{{ m['content'] if loop.last else 'earlier' }}<|im_end|>{% endgeneration %}",
    )
    source, output = write_rows(tmp_path / "in.jsonl", many(8)), tmp_path / "rows.jsonl"
    regenerate(target, forgetful, [source], output, RegenerateSettings(batch_size=3))
    whole = output.read_bytes()
    complete = 0
    for end in (at + 1 for at, byte in enumerate(whole) if byte == 10):
        metadata = json.loads(whole[:end].splitlines()[-1])["metadata"]
        complete += metadata["part"] == metadata["parts"]
        output.write_bytes(whole[:end])
        assert regenerate(target, forgetful, [source], output, RegenerateSettings(batch_size=3)).skipped == complete
        assert output.read_bytes() == whole


def test_killed_runs_end_with_the_same_file(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Processes of their own, killed while they write: the file has grown by at least so many bytes."""
    source, output = write_rows(tmp_path / "in.jsonl", many(60)), tmp_path / "rows.jsonl"
    reference = tmp_path / "reference.jsonl"
    request = RegenerateSettings(batch_size=2, temperature=0.7, max_new_tokens=60)
    regenerate(target, tokenizer, [source], reference, request)
    generate = target.generate

    def slow(*args: Any, **more: Any) -> list[list[int]]:
        time.sleep(0.002)
        return generate(*args, **more)

    target.generate = slow
    size = 0
    for extra in (1, 900, 5000, 7000, 12_000):
        child = os.fork()
        if child == 0:
            try:
                regenerate(target, tokenizer, [source], output, request)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 60
        while not output.exists() or output.stat().st_size < size + extra:
            assert time.monotonic() < deadline
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        size = output.stat().st_size
    assert size < reference.stat().st_size
    done = sum(row["metadata"]["part"] == row["metadata"]["parts"] for row in read_whole_lines(output))
    last = regenerate(target, tokenizer, [source], output, request)
    assert (last.ok, last.skipped) == (60 - done, done)
    assert output.read_bytes() == reference.read_bytes()


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def test_an_output_that_is_not_ours_is_left_alone(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many(3)), tmp_path / "rows.jsonl"

    def refused(words: str, **settings: Any) -> None:
        before = output.read_bytes()
        with pytest.raises(DataError, match=words):
            regenerate(target, tokenizer, [source], output, RegenerateSettings(**settings))
        assert output.read_bytes() == before

    for foreign in ("notes", "notes\n", '{"id": "a", "messages": []}', '{"id": "a"}\n{"id": "'):
        output.write_text(foreign)
        refused("not a row of regenerated text")
    output.unlink()
    regenerate(target, tokenizer, [source], output, RegenerateSettings())
    refused("temperature = 0.0, not 0.5", temperature=0.5)
    refused("seed = 0, not 3", seed=3)
    with pytest.raises(DataError, match="dtype = 'float32', not 'bfloat16'"):
        regenerate(target, tokenizer, [source], output, RegenerateSettings(), dtype=torch.bfloat16)
    with output.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused("being written by another run")
    with pytest.raises(DataError, match="one of the files that are read"):
        regenerate(target, tokenizer, [source], source, RegenerateSettings())


def test_another_target_of_the_same_name_does_not_continue_a_file(
    target: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many(3)), tmp_path / "rows.jsonl"
    describe = target.describe
    for version in ("first", "second"):
        (tmp_path / version / "model").mkdir(parents=True)
        (tmp_path / version / "model" / "model.safetensors").write_text(version)
        spec = replace(describe(), path=tmp_path / version / "model")
        monkeypatch.setattr(target, "describe", lambda spec=spec: spec)
        if version == "first":
            assert regenerate(target, tokenizer, [source], output, RegenerateSettings()).ok == 3
    with pytest.raises(DataError, match="was generated with weights = "):
        regenerate(target, tokenizer, [source], output, RegenerateSettings())


@pytest.mark.parametrize(
    "changed",
    [chat("b", "old"), chat("a", "old", "b"), chat("a", "old", tools=[{"type": "function", "name": "f"}])],
    ids=["question", "more turns", "tools"],
)
def test_answers_to_other_messages_are_not_kept(
    target: Any, tokenizer: Any, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """Rows without ids are known by their place alone, where another conversation may stand the next time."""
    data, output = write_rows(tmp_path / "in.jsonl", [chat("a", "old")]), tmp_path / "out.jsonl"
    regenerate(target, tokenizer, [data], output, RegenerateSettings())
    before = output.read_bytes()
    write_rows(data, [chat("a", "another text of the turn that is replaced")])
    assert regenerate(target, tokenizer, [data], output, RegenerateSettings()).skipped == 1
    write_rows(data, [changed])
    with pytest.raises(DataError, match=r"other messages under .*in.jsonl:1: the data have changed"):
        regenerate(target, tokenizer, [data], output, RegenerateSettings())
    assert output.read_bytes() == before


def test_progress_starts_before_the_first_batch(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    data, said = write_rows(tmp_path / "in.jsonl", many(3)), []
    settings = RegenerateSettings(batch_size=2)
    regenerate(
        target, tokenizer, [data], tmp_path / "out.jsonl", settings, progress=lambda *report: said.append(report)
    )
    assert said == [("generate", done, 3) for done in (0, 2, 3)]


def test_trouble_with_files_is_named(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", many(6))
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be written"):
        regenerate(target, tokenizer, [source], source / "rows.jsonl", RegenerateSettings())
    bad = write_rows(tmp_path / "bad.jsonl", ["{", {"text": "x"}])
    with pytest.raises(DataError, match=r"none of the 2 rows(.|\n)*bad\.jsonl:1(.|\n)*bad\.jsonl:2: not a conv"):
        regenerate(target, tokenizer, [bad], tmp_path / "rows.jsonl", RegenerateSettings())


def test_a_full_disk_costs_nothing_that_was_finished(target: Any, tokenizer: Any, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", many(6)), tmp_path / "rows.jsonl"
    whole = tmp_path / "whole.jsonl"
    request = RegenerateSettings(batch_size=2)
    regenerate(target, tokenizer, [source], whole, request)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size * 2 // 3, hard))
    try:
        with pytest.raises(DataError, match=r"rows\.jsonl cannot be written: File too large"):
            regenerate(target, tokenizer, [source], output, request)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert regenerate(target, tokenizer, [source], output, request).skipped > 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("field", [{"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}])
def test_settings_are_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        RegenerateSettings(**field)
