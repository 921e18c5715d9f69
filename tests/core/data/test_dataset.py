"""From files to samples and prompts: counts, cuts, filters, and errors that say what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from torchspec.core.config.schema import DataConfig
from torchspec.core.data.chat import render
from torchspec.core.data.dataset import DatasetSettings, TokenDataset, load_dataset, load_prompts
from torchspec.core.data.rows import BadRow, read_rows
from torchspec.core.errors import DataError, TargetError

MakeTokenizer = Callable[[str | None], PreTrainedTokenizerBase]
WriteRows = Callable[..., Path]
Chat = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tmp_path: Path) -> DatasetSettings:
    return DatasetSettings(cache_dir=tmp_path / "cache")


def decoded(dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    sample = dataset[index]
    return str(tokenizer.decode(sample.input_ids_T[sample.loss_mask_T]))


def test_mixed_files(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, settings: DatasetSettings
) -> None:
    tokenizer = make_tokenizer("chatml")
    first = write_rows(
        [
            chat("q", "the fox", id="a"),
            "{broken",
            chat("q", "yes", id="a"),
            chat("only a question"),
            {"text": "<s>hello</s>"},
            {"messages": [{"role": "king", "content": "x"}]},
        ]
    )
    second = write_rows(
        [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [9999], "loss_mask": [1]}], "b.json"
    )
    dataset = load_dataset([first, second], tokenizer, settings)
    report = dataset.report
    assert (report.read, report.kept, report.filtered, report.bad_count, report.truncated) == (8, 4, 1, 3, 0)
    assert [(row.file, row.line) for row in report.bad] == [(first, 2), (first, 6), (second, 2)]
    assert "token id 9999 is outside" in report.bad[2].reason
    ids = [dataset[index].sample_id for index in range(len(dataset))]
    assert ids == ["a", "a#2", "rows.jsonl:5", "b.json:1"]
    assert [decoded(dataset, tokenizer, i) for i in range(3)] == ["the fox<|im_end|>", "yes<|im_end|>", "<s>hello</s>"]
    assert dataset[3].input_ids_T.tolist() == [5, 6, 7]
    assert dataset[3].input_ids_T.dtype == torch.int64
    assert dataset[3].loss_mask_T.dtype == torch.bool
    assert dataset.lengths == [len(dataset[i].input_ids_T) for i in range(4)]
    assert report.tokens == sum(dataset.lengths)
    supervised = [token for i in range(4) for token in dataset[i].input_ids_T[dataset[i].loss_mask_T].tolist()]
    assert report.supervised_tokens == len(supervised)
    assert dataset.token_counts_V.tolist() == [supervised.count(token) for token in range(len(dataset.token_counts_V))]
    assert "8 rows read, 4 kept, 1 filtered, 3 bad" in report.describe()
    assert f"{first}:2: not valid JSON" in report.describe()
    with pytest.raises(IndexError):
        dataset[4]
    with pytest.raises(IndexError):
        dataset[-1]


def test_cut_then_filtered(make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    rows = [chat("q", "yes"), chat("q", "the value of the function " * 9), chat("long question " * 30, "yes")]
    path = write_rows(rows)
    whole = [render(row, tokenizer) for row in read_rows([path]) if not isinstance(row, BadRow)]
    limit = 40
    assert whole[0].input_ids.size < limit < whole[1].input_ids.size
    settings = DatasetSettings(max_length=limit, min_supervised_tokens=2, cache_dir=tmp_path)
    dataset = load_dataset([path], tokenizer, settings)
    assert (dataset.report.kept, dataset.report.truncated, dataset.report.filtered) == (2, 1, 1)
    for index in range(2):
        assert dataset[index].input_ids_T.tolist() == whole[index].input_ids[:limit].tolist()
        assert dataset[index].loss_mask_T.tolist() == whole[index].loss_mask[:limit].tolist()
    enough = int(whole[0].loss_mask.sum())
    for wanted, kept in ((enough, 2), (enough + 1, 1)):
        settings = DatasetSettings(max_length=limit, min_supervised_tokens=wanted, cache_dir=tmp_path)
        assert len(load_dataset([path], tokenizer, settings)) == kept


def test_every_row_bad_is_an_error_with_the_first_reasons(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, settings: DatasetSettings
) -> None:
    path = write_rows(["{", {"messages": 5}, *[{}] * 8])
    with pytest.raises(DataError) as caught:
        load_dataset([path], make_tokenizer("chatml"), settings)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"no row of {path} can be used, of 10 read: 10 bad"
    assert len(lines) == 6
    assert lines[2] == f"  {path}:2: messages must be a list of messages, it is a number"


def test_nothing_supervised_is_an_error(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, settings: DatasetSettings
) -> None:
    path = write_rows([chat("q"), chat("p"), "{"])
    said = r"of 3 read: 1 bad, 2 with fewer than 1 supervised tokens.* \(data\.min_supervised_tokens, data\.max_length"
    with pytest.raises(DataError, match=said):
        load_dataset([path], make_tokenizer("chatml"), settings)


def test_only_the_first_bad_rows_are_kept(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, settings: DatasetSettings
) -> None:
    report = load_dataset([write_rows([*["{"] * 150, chat("q", "a")])], make_tokenizer("chatml"), settings).report
    assert (report.bad_count, len(report.bad)) == (150, 100)
    assert report.describe().endswith("  and 145 more")


def test_conversations_need_a_template_and_other_rows_do_not(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, settings: DatasetSettings
) -> None:
    tokenizer = make_tokenizer(None)
    assert len(load_dataset([write_rows([{"text": "yes"}])], tokenizer, settings)) == 1
    with pytest.raises(TargetError, match="has no chat template"):
        load_dataset([write_rows([{"text": "yes"}, chat("q", "a")])], tokenizer, settings)


def test_last_turn_only_is_decided_per_sample(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, settings: DatasetSettings
) -> None:
    tokenizer = make_tokenizer("thinking")
    path = write_rows([chat("q", "one", "q", "two"), chat("q", "one", "q", "<think>\nso\n</think>\n\ntwo")])
    dataset = load_dataset([path], tokenizer, settings)
    assert decoded(dataset, tokenizer, 0) == "one<|im_end|><think>\n\n</think>\n\ntwo<|im_end|>"
    assert decoded(dataset, tokenizer, 1) == "<think>\nso\n</think>\n\ntwo<|im_end|>"


def test_order_survives_batching(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, settings: DatasetSettings
) -> None:
    """Some two thousand rows of several kinds, over several batches of the background tokenizer."""
    rows = [
        [chat("q", f"answer {n}", id=n), {"id": n, "input_ids": [n % 300], "loss_mask": [1]}, "{"][n % 3]
        for n in range(2500)
    ]
    dataset = load_dataset([write_rows(rows)], make_tokenizer("chatml"), settings)
    assert [dataset[i].sample_id for i in range(len(dataset))] == [str(n) for n in range(2500) if n % 3 < 2]
    assert [row.line for row in dataset.report.bad[:3]] == [3, 6, 9]
    at = [n for n in range(2500) if n % 3 < 2].index(2498 if 2498 % 3 == 0 else 2499)
    assert str(int(dataset[at].sample_id)) in make_tokenizer("chatml").decode(dataset[at].input_ids_T)


def test_progress_is_shown_at_least_twice_a_second(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, settings: DatasetSettings
) -> None:
    path = write_rows([chat("the quick brown fox " * 40, "returns the value of the function " * 40)] * 500)
    calls: list[tuple[str, int, int]] = []
    start = time.monotonic()
    load_dataset([path], make_tokenizer("chatml"), settings, lambda *call: calls.append(call))
    seconds = time.monotonic() - start
    assert len(calls) >= 2 * seconds
    size = path.stat().st_size
    steps = [done for stage, done, total in calls if stage == "tokenise"]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, size)
    assert ("hash data", size, size) in calls
    assert all(0 <= done <= total for _, done, total in calls)


def test_prompts(make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, settings: DatasetSettings) -> None:
    tokenizer = make_tokenizer("chatml")
    path = write_rows(
        [
            chat("one", "two", "three", "four", id="x"),
            "{",
            chat("waiting", id="x"),
            {"text": "t"},
            {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]},
            chat("much too long " * 900, "a"),
        ]
    )
    prompts = load_prompts([path], tokenizer, settings)
    assert [prompt.sample_id for prompt in prompts] == ["x", "x#2", "rows.jsonl:5"]
    assert tokenizer.decode(prompts[0].input_ids) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts[2].input_ids == (5,)
    assert load_prompts([path], tokenizer, settings, count=9) == prompts
    many = write_rows([chat("one", "two", id=str(n)) for n in range(7)])
    spread = load_prompts([many], tokenizer, settings, count=3)
    assert [prompt.sample_id for prompt in spread] == ["0", "2", "4"]
    with pytest.raises(DataError, match="can be used, of 1 read: 1 bad"):
        load_prompts([write_rows([{"text": "t"}])], tokenizer, settings)


def test_settings_from_the_configuration(tmp_path: Path) -> None:
    config = DataConfig(
        train=[tmp_path], max_length=7, min_supervised_tokens=3, last_turn_only="always", cache_dir=tmp_path
    )
    expected = DatasetSettings(max_length=7, min_supervised_tokens=3, last_turn_only="always", cache_dir=tmp_path)
    assert DatasetSettings.from_config(config) == expected
    assert DatasetSettings.from_config(DataConfig(train=[tmp_path])) == DatasetSettings()
