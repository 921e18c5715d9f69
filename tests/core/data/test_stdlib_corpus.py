"""The standard-library corpus: splits, forms, determinism, and a fabricated library."""

from __future__ import annotations

import ast
import json
from itertools import combinations
from pathlib import Path
from typing import get_args

import pytest

from torchspec.core.data.stdlib_corpus import (
    Conversation,
    iter_conversations,
    iter_source_text,
    write_jsonl,
)
from torchspec.core.data.stdlib_files import Split, split_of, stdlib_folder, top_level_name

SPLITS: tuple[Split, ...] = get_args(Split)

MODULE = '''
"""A module."""

def greet(name: str = "you", *rest, loud=False) -> str:
    """Say hello to somebody.

    Loudly if asked to.
    """

    text = f"hello {name}"
    return text.upper() if loud else text


def silent(x):
    return x


def same(x):
    """This function is written twice, word for word."""
    value = x + 1
    return value


try:
    import nothing
except ImportError:
    class Fallback(dict):
        """Stands in for something that is missing."""

        @property
        def size(self):
            """The number of entries that it holds."""
            entries = list(self)
            return len(entries)
'''


@pytest.fixture(scope="module")
def conversations() -> dict[Split, list[Conversation]]:
    return {split: list(iter_conversations(split)) for split in SPLITS}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library whose modules lie in known splits: names are searched for, not written down."""
    root = tmp_path / "lib"
    root.mkdir()
    for split in SPLITS:
        (root / f"{_name(split)}.py").write_text(MODULE, encoding="utf-8")
    folder = root / "site-packages" / _name("train")
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(MODULE, encoding="utf-8")
    return root


def _name(split: Split) -> str:
    return next(name for name in (f"module{i}" for i in range(1000)) if split_of(name) == split)


def _top(conversation: Conversation) -> str:
    return top_level_name(conversation.id.partition(":")[0])


def test_splits_share_no_top_level_module(conversations: dict[Split, list[Conversation]]) -> None:
    names = {split: {_top(item) for item in items} for split, items in conversations.items()}
    for one, other in combinations(SPLITS, 2):
        assert names[one].isdisjoint(names[other])
    assert all(split_of(name) == split for split, found in names.items() for name in found)


def test_answers_and_ids_are_unique_over_all_splits(conversations: dict[Split, list[Conversation]]) -> None:
    everything = [item for items in conversations.values() for item in items]
    assert len({item.id for item in everything}) == len(everything)
    assert len({item.answer for item in everything}) == len(everything)


def test_held_out_splits_are_large_enough(conversations: dict[Split, list[Conversation]]) -> None:
    total = sum(map(len, conversations.values()))
    for split in ("validation", "test"):
        assert len(conversations[split]) >= 400
        assert 0.03 * total < len(conversations[split]) < 0.08 * total
        assert len({_top(item) for item in conversations[split]}) >= 9


def test_written_answers_are_python(conversations: dict[Split, list[Conversation]]) -> None:
    for item in conversations["test"]:
        if item.id.endswith(":write"):
            body = ast.parse(item.answer).body
            assert len(body) == 1
            assert isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            assert item.id.split(":")[1].rpartition(".")[2] == body[0].name


def test_documented_source_does_not_hold_its_docstring(
    conversations: dict[Split, list[Conversation]],
) -> None:
    reverse = [item for item in conversations["test"] if item.id.endswith(":document")]
    assert len(reverse) > 100
    for item in reverse:
        assert item.answer not in item.messages[0]["content"]


def test_messages_are_one_question_and_one_answer(conversations: dict[Split, list[Conversation]]) -> None:
    for item in conversations["validation"]:
        assert [message["role"] for message in item.messages] == ["user", "assistant"]
        assert all(message["content"].strip() for message in item.messages)
        assert len(item.answer) <= 3000


def test_fabricated_library(library: Path) -> None:
    found = {item.id: item for split in SPLITS for item in iter_conversations(split, stdlib=library)}
    name = _name("train")
    # The other two modules are word for word the same, so nothing of them is left.
    assert set(found) == {
        f"{name}:{item}:{form}"
        for item in ("greet", "same", "Fallback", "Fallback.size")
        for form in ("write", "document")
    }
    write, document = found[f"{name}:greet:write"], found[f"{name}:greet:document"]
    question = write.messages[0]["content"]
    assert "def greet(name: str='you', *rest, loud=False) -> str" in question
    assert "Say hello to somebody.\n\nLoudly if asked to." in question
    assert write.answer.startswith("def greet(")
    assert '"""Say hello' in write.answer
    assert document.answer == "Say hello to somebody.\n\nLoudly if asked to."
    assert 'text = f"hello {name}"' in document.messages[0]["content"]
    assert found[f"{name}:Fallback.size:write"].answer.startswith("@property\ndef size(self):\n    ")
    assert "class Fallback(dict)" in found[f"{name}:Fallback:write"].messages[0]["content"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('def f(x): "A docstring on the line of its def."; return x', "one line"),
        ('def f(x):\n    """Nothing but this docstring, which is long enough."""', "no body"),
        ('def f(x):\n    """Short."""\n    value = x + 1\n    return value + value + value', "short docstring"),
        ('class C:\n    def f(self):\n        """Its text is less indented than its code."""\n'
         '        return """\nflush left and so the dedented source is broken\n"""', "flush-left string"),
        ('def f(x):\n    """A docstring of the right length."""\n' + "    x += 1\n" * 400, "too long"),
    ],
)  # fmt: skip
def test_items_that_do_not_stand_alone_are_left_out(tmp_path: Path, body: str, reason: str) -> None:
    name = _name("train")
    (tmp_path / f"{name}.py").write_text(body + "\n", encoding="utf-8")
    assert not list(iter_conversations("train", stdlib=tmp_path)), reason


def test_files_that_do_not_parse_are_counted(library: Path) -> None:
    (library / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    assert write_jsonl(library.parent / "out", stdlib=library)["skipped_files"] == 1


def test_jsonl_rows_and_counts(library: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    counts = write_jsonl(tmp_path / "data" / "set", stdlib=library, progress=lambda *report: reports.append(report))
    read = len(reports) - 1
    assert read > 1
    assert reports == [("source files", n, 0) for n in range(1, read + 1)] + [("source files", read, read)]
    assert counts == {"train": 8, "validation": 0, "test": 0, "skipped_files": 0}
    folder = tmp_path / "data" / "set"
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [{"id": c.id, "messages": c.messages} for c in iter_conversations("train", stdlib=library)]
    assert rows == expected


def test_same_library_gives_same_bytes(library: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a", stdlib=library)
    write_jsonl(tmp_path / "b", stdlib=library)
    write_jsonl(tmp_path / "b", stdlib=library)
    for name in ("train", "validation", "test"):
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()


def test_test_suite_lies_with_the_module_it_tests(library: Path) -> None:
    held_out = _name("test")
    suite = library / "test"
    suite.mkdir()
    for name in (f"test_{held_out}", f"test_{held_out}_more", "helper"):
        (suite / f"{name}.py").write_text(f"# text of {name}\n", encoding="utf-8")
    texts = {split: dict(iter_source_text(split, stdlib=library)) for split in SPLITS}
    suite_modules = {module for text in texts.values() for module in text if module.startswith("test.")}
    assert suite_modules == {f"test.test_{held_out}", f"test.test_{held_out}_more"}
    assert suite_modules <= set(texts["test"])
    assert not [item for item in iter_conversations("test", stdlib=library) if item.id.startswith("test.")]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("json.decoder", "json"),
        ("_pydecimal", "decimal"),
        ("_strptime", "strptime"),
        ("__future__", "future__"),
        ("ntpath", "posixpath"),
        ("test.test_json.test_tool", "json"),
        ("test.test_urllib2net", "urllib"),
        ("test.test_ntpath", "posixpath"),
        ("test.test_grammar", "grammar"),
    ],
)
def test_top_level_names(module: str, name: str) -> None:
    assert top_level_name(module, frozenset({"json", "url", "urllib", "ntpath"})) == name


def test_splits_do_not_move() -> None:
    """Held-out modules of trained models: a change here puts test text into their training."""
    assert [name for name in ("json", "asyncio", "tkinter") if split_of(name) != "train"] == []
    assert split_of("collections") == split_of("random") == "validation"
    assert split_of("enum") == split_of("contextlib") == "test"


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'dev'; choose one of train, validation, test"):
        list(iter_conversations("dev"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a directory"):
        list(iter_conversations("train", stdlib=tmp_path / "none"))


def test_default_folder_is_the_running_interpreters() -> None:
    assert Path(ast.__file__).parent == stdlib_folder()
