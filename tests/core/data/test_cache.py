"""The cache of tokenised data: what its key covers, and that nothing which happens to its files harms a run."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from torchspec.core.data import cache, token_file
from torchspec.core.data.dataset import DatasetSettings, TokenDataset, load_dataset
from torchspec.core.data.token_file import CorruptFileError, open_token_file

MakeTokenizer = Callable[[str | None], PreTrainedTokenizerBase]
WriteRows = Callable[..., Path]
Chat = Callable[..., dict[str, Any]]


ROWS = 300


class Loader:
    """Loads one file with one tokenizer, and knows whether it had to tokenise."""

    def __init__(self, files: list[Path], tokenizer: PreTrainedTokenizerBase, settings: DatasetSettings) -> None:
        self.files, self.tokenizer, self.settings = files, tokenizer, settings
        self.tokenised = False

    def __call__(self, **changes: Any) -> TokenDataset:
        stages: list[str] = []
        dataset = load_dataset(
            self.files, self.tokenizer, replace(self.settings, **changes), lambda stage, *_: stages.append(stage)
        )
        self.tokenised = "tokenise" in stages
        return dataset

    def entry(self) -> Path:
        (path,) = (self.settings.cache_dir or Path()).glob("tokens/*.safetensors")
        return path


@pytest.fixture
def loader(make_tokenizer: MakeTokenizer, write_rows: WriteRows, chat: Chat, tmp_path: Path) -> Loader:
    path = write_rows([chat("q", f"the fox {n}", id=f"sämple {n}") for n in range(50)] + ["{", chat("no answer")])
    return Loader([path], make_tokenizer("chatml"), DatasetSettings(cache_dir=tmp_path / "cache"))


def contents(dataset: TokenDataset) -> list[Any]:
    samples = [dataset[index] for index in range(len(dataset))]
    rows = [(s.sample_id, s.input_ids_T.tolist(), s.loss_mask_T.tolist()) for s in samples]
    return [rows, dataset.lengths, dataset.report, dataset.token_counts_V.tolist(), dataset.fingerprint]


def test_second_time_is_read_from_the_cache(loader: Loader) -> None:
    first = contents(loader())
    assert loader.tokenised
    stamp = loader.entry().stat()
    second = contents(loader())
    assert not loader.tokenised
    assert second == first
    assert loader.entry().stat() == stamp or loader.entry().stat().st_mtime_ns == stamp.st_mtime_ns


def _edit(loader: Loader, _: pytest.MonkeyPatch) -> None:
    text = loader.files[0].read_text()
    loader.files[0].write_text(text.replace("the fox 7", "the fix 7"))


def _rename(loader: Loader, _: pytest.MonkeyPatch) -> None:
    loader.files = [loader.files[0].rename(loader.files[0].with_name("other.jsonl"))]


def _add_file(loader: Loader, _: pytest.MonkeyPatch) -> None:
    loader.files.append(Path(shutil.copy(loader.files[0], loader.files[0].with_name("more.jsonl"))))


def _tokenizer(loader: Loader, _: pytest.MonkeyPatch) -> None:
    loader.tokenizer.add_tokens(["fox"])


def _split_special(loader: Loader, _: pytest.MonkeyPatch) -> None:
    loader.tokenizer.split_special_tokens = True


def _eos(loader: Loader, _: pytest.MonkeyPatch) -> None:
    loader.tokenizer.eos_token = "<|eot_id|>"


def _template(loader: Loader, _: pytest.MonkeyPatch) -> None:
    loader.tokenizer.chat_template = str(loader.tokenizer.chat_template).replace("{{ m['role'] }}", "a {{ m['role'] }}")


def _max_length(loader: Loader, _: pytest.MonkeyPatch) -> None:
    loader.settings = replace(loader.settings, max_length=14)


def _min_supervised(loader: Loader, _: pytest.MonkeyPatch) -> None:
    loader.settings = replace(loader.settings, min_supervised_tokens=2)


def _last_turn(loader: Loader, _: pytest.MonkeyPatch) -> None:
    loader.settings = replace(loader.settings, last_turn_only="always")


def _library(loader: Loader, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache, "version", lambda name: "99" if name == "tokenizers" else "1")


def _rules(loader: Loader, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache, "_RULES_VERSION", 0)


def _format(loader: Loader, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache, "FORMAT_VERSION", 0)


@pytest.mark.parametrize(
    "change",
    [
        _edit, _rename, _add_file, _tokenizer, _split_special, _eos, _template, _max_length, _min_supervised,
        _last_turn, _library, _rules, _format,
    ],
)  # fmt: skip
def test_every_ingredient_is_in_the_key(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, change: Callable[[Loader, pytest.MonkeyPatch], None]
) -> None:
    before = loader().fingerprint
    change(loader, monkeypatch)
    after = loader().fingerprint
    assert loader.tokenised
    assert after != before


def test_order_of_the_files_is_in_the_key(loader: Loader) -> None:
    _add_file(loader, pytest.MonkeyPatch())
    before = loader().fingerprint
    loader.files.reverse()
    assert loader().fingerprint != before
    assert loader.tokenised


def test_a_moved_file_is_found_and_its_bad_rows_are_named_anew(loader: Loader, tmp_path: Path) -> None:
    before = loader()
    (tmp_path / "elsewhere").mkdir()
    loader.files = [Path(shutil.move(loader.files[0], tmp_path / "elsewhere" / loader.files[0].name))]
    after = loader()
    assert not loader.tokenised
    assert after.fingerprint == before.fingerprint
    assert [row.file for row in after.report.bad] == loader.files


def _damaged(data: bytes) -> dict[str, bytes]:
    """A bit flipped in every part of the file, and several other mishaps."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    places = {name: 8 + length + header[name]["data_offsets"][0] + 3 for name in token_file.COLUMNS}
    places["facts"] = data.index(b"supervised_tokens") + 2
    flipped = {name: data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for name, at in places.items()}
    cut = {f"cut at {at}": data[:at] for at in (0, 5, 8, 100, 8 + length, len(data) // 2, len(data) - 1)}
    other = json.dumps({"__metadata__": {"format": "torchspec tokens 0"}}).encode()
    return {
        **flipped,
        **cut,
        "longer": data + b"x",
        "length": b"\xff" * 8 + data[8:],
        "other format": len(other).to_bytes(8, "little") + other,
        "no metadata": (2).to_bytes(8, "little") + b"{}",
        "not even close": b"hello " * 100,
    }


def test_damaged_entries_are_noticed_and_made_again(loader: Loader, caplog: pytest.LogCaptureFixture) -> None:
    expected = contents(loader())
    path = loader.entry()
    intact = path.read_bytes()
    for name, data in _damaged(intact).items():
        path.write_bytes(data)
        with pytest.raises(CorruptFileError):
            open_token_file(path)
        caplog.clear()
        assert contents(loader()) == expected, name
        assert loader.tokenised, name
        assert "cannot be used and are made again" in caplog.text
        assert path.read_bytes() == intact, name


def test_unwritable_cache(loader: Loader, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = contents(loader())
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for _ in range(2):
        caplog.clear()
        assert contents(loader(cache_dir=blocked)) == expected
        assert loader.tokenised
        assert "tokenised data is not cached" in caplog.text


def test_default_cache_directory(loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSPEC_CACHE", str(tmp_path / "users"))
    loader(cache_dir=None)
    assert list((tmp_path / "users" / "tokens").glob("*.safetensors"))


def test_a_file_changed_while_it_is_read_is_not_cached(loader: Loader, caplog: pytest.LogCaptureFixture) -> None:
    def meddle(stage: str, done: int, total: int) -> None:
        if stage == "tokenise" and done == 0:
            with loader.files[0].open("a") as file:
                file.write('{"text": "one more"}\n')

    dataset = load_dataset(loader.files, loader.tokenizer, loader.settings, meddle)
    assert len(dataset) == 51
    assert "was changed while it was read" in caplog.text
    assert not list((loader.settings.cache_dir or Path()).glob("tokens/*.safetensors"))


def test_waiting_for_a_stuck_process_ends(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = contents(loader())
    path = loader.entry()
    path.unlink()
    monkeypatch.setattr(cache, "_LOCK_PATIENCE_S", 0.3)
    stages: list[str] = []
    with path.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        dataset = load_dataset(loader.files, loader.tokenizer, loader.settings, lambda stage, *_: stages.append(stage))
    assert contents(dataset) == expected
    assert "wait for another process" in stages
    assert "another process has been tokenising" in caplog.text


# Real processes. Each waits to be let go, and sends a digest of what it loaded, whether it tokenised, and its warnings.
CHILD = """
import contextlib, hashlib, json, logging, os, pathlib, resource, time
from torchspec.core.data import cache, dataset, token_file
from torchspec.core.data.tokenizer import load_tokenizer
stages, warnings = set(), []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("torchspec").addHandler(handler)
def progress(stage, done, total):
    if stage == "tokenise" and stage not in stages:
        if mode == "locked":
            time.sleep(1)  # the others arrive meanwhile
        elif mode != "full":
            connection.send("tokenising")
            connection.recv()
    stages.add(stage)
if mode == "unlocked":
    dataset.locked = lambda *_: contextlib.nullcontext()
if mode == "full":
    token_file._BLOCK = 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
tokenizer = load_tokenizer(target)
connection.send("ready")
connection.recv()
made = dataset.load_dataset([file], tokenizer, dataset.DatasetSettings(cache_dir=directory), progress)
digest = hashlib.sha256()
for index in range(len(made)):
    sample = made[index]
    digest.update(json.dumps([sample.sample_id, sample.input_ids_T.tolist(), sample.loss_mask_T.tolist()]).encode())
digest.update(json.dumps(made.token_counts_V.tolist()).encode())
connection.send((digest.hexdigest(), made.report.kept, "tokenise" in stages, warnings))
"""


@dataclass(frozen=True)
class Outcome:
    digest: str
    kept: int
    tokenised: bool
    warnings: list[str]


def received(connection: Any) -> Any:
    assert connection.poll(120), "a process hangs"
    return connection.recv()


class Children:
    """Processes that load the same data, started together and then let go together."""

    def __init__(self, target: Path, file: Path, directory: Path) -> None:
        self.names = {"target": target, "file": file, "directory": directory}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torchspec.core.data.dataset", "torchspec.core.data.tokenizer"])

    def start(self, *modes: str, limit: int = 0) -> list[tuple[Any, Any]]:
        started = []
        for mode in modes:
            ours, theirs = self.context.Pipe()
            names = {**self.names, "mode": mode, "limit": limit, "connection": theirs}
            process = self.context.Process(target=exec, args=(CHILD, names), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        for _, connection in started:
            assert received(connection) == "ready"
        for _, connection in started:
            connection.send("go")
        return started

    def outcomes(self, *modes: str, limit: int = 0) -> list[Outcome]:
        return [self.outcome(*child) for child in self.start(*modes, limit=limit)]

    def outcome(self, process: Any, connection: Any) -> Outcome:
        outcome = Outcome(*received(connection))
        process.join()
        return outcome


@pytest.fixture
def children(tiny_target: Path, write_rows: WriteRows, chat: Chat, tmp_path: Path) -> Children:
    rows = [chat(f"what returns {n}?", f"the value of the function {n} " * 5) for n in range(ROWS)]
    return Children(tiny_target, write_rows(rows), tmp_path / "cache")


def test_processes_at_once(children: Children, tmp_path: Path) -> None:
    """With the lock one of them works; without it both do, and neither harms the other."""
    directory = tmp_path / "cache" / "tokens"
    locked = children.outcomes("locked", "locked")
    assert sorted(outcome.tokenised for outcome in locked) == [False, True]
    shutil.rmtree(directory)
    started = children.start("unlocked", "unlocked")
    for _, connection in started:
        assert received(connection) == "tokenising"
    for _, connection in started:
        connection.send("go")
    unlocked = [children.outcome(*child) for child in started]
    assert {(outcome.digest, outcome.kept) for outcome in locked + unlocked} == {(locked[0].digest, ROWS)}
    assert not any(outcome.warnings for outcome in locked + unlocked)
    assert [path.suffix for path in directory.iterdir()] == [".safetensors"]


def test_disk_full(children: Children, tmp_path: Path) -> None:
    """A limit on file sizes makes writes fail half-way: first the columns, then only the finished file."""
    (whole,) = children.outcomes("locked")
    assert not whole.warnings
    directory = tmp_path / "cache" / "tokens"
    (entry,) = directory.glob("*.safetensors")
    size = entry.stat().st_size
    entry.unlink()
    for limit in (5000, size - 1):
        (outcome,) = children.outcomes("full", limit=limit)
        assert (outcome.digest, outcome.kept) == (whole.digest, ROWS)
        (warning,) = outcome.warnings
        assert "tokenised data is kept in memory" in warning
        assert "File too large" in warning
        assert [path.suffix for path in directory.iterdir()] == [".lock"]


def test_killed_while_tokenising(children: Children, tmp_path: Path) -> None:
    ((process, connection),) = children.start("killed")
    assert received(connection) == "tokenising"
    process.kill()
    process.join()
    directory = tmp_path / "cache" / "tokens"
    assert [path.suffix for path in directory.iterdir()] == [".lock"]
    (outcome,) = children.outcomes("locked")
    assert (outcome.tokenised, outcome.kept, outcome.warnings) == (True, ROWS, [])
