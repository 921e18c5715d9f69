"""Conversations about Python, built from the standard library of the interpreter at hand.

Every documented function, method and class of reasonable length gives up to two conversations:

* ``write``: the question holds the signature and the docstring, the answer is the source;
* ``document``: the question holds the source without its docstring, the answer is the docstring.

Split: by top-level module, by a salted sha256 of its name, about 90 / 5 / 5 for train / validation /
test (:mod:`torchspec.core.data.stdlib_files`); a package lies whole in one split, and the test suite of a
module lies in the split of that module. An answer that occurs twice is kept once, where train comes
before validation and validation before test: no held-out answer is a training answer.

Everything is deterministic: the same library gives the same conversations in the same order.
Only the standard library is imported.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from torchspec.core.data.stdlib_files import SourceFile, Split, check_split, iter_files

# Characters. 3,000 of source are some 900 tokens of a small code vocabulary.
_MIN_SOURCE, _MAX_SOURCE = 60, 3000
_MIN_DOC, _MAX_DOC = 15, 1500

_WRITE_QUESTIONS = (
    "Write the Python {kind} `{signature}` of {place}.\n\n{doc}",
    "Implement this {kind} of {place} in Python: `{signature}`\n\n{doc}",
    "Here is what the {kind} `{signature}` of {place} does. Write its source.\n\n{doc}",
    "{doc}\n\nWrite the Python {kind} `{signature}` of {place} that does this.",
)
_DOCUMENT_QUESTIONS = (
    "Write the docstring of this Python {kind} of {place}.\n\n{source}",
    "What does this {kind} of {place} do? Answer with its docstring.\n\n{source}",
    "{source}\n\nDocument this Python {kind} of {place}.",
)

Progress = Callable[[str, int, int], None]
_STAGE = "source files"

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Item = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One question and its answer.

    ``id`` is module, qualified name and form, ``json.decoder:JSONDecoder.decode:write``; ``messages`` are
    two, ``{"role": "user" | "assistant", "content": ...}``.
    """

    id: str
    messages: list[dict[str, str]]

    @property
    def answer(self) -> str:
        """The content of the last message."""
        return self.messages[-1]["content"]


def _walk(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, _Item]]:
    """Functions and classes with their qualified names, but not those local to a function."""
    for node in body:
        if isinstance(node, _Item):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _walk(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If):
            yield from _walk(node.body + node.orelse, prefix)
        elif isinstance(node, ast.Try):
            handlers = [child for handler in node.handlers for child in handler.body]
            yield from _walk(node.body + handlers + node.orelse, prefix)


def _signature(node: _Item) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(part) for part in (*node.bases, *node.keywords))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    start = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{start} {node.name}({ast.unparse(node.args)}){returns}"


def _sources(node: _Item, lines: list[str]) -> tuple[str, str] | None:
    """The item's source and the same without its docstring, both dedented.

    None where one of them would not stand alone: nothing but a docstring, a one-line body, a string that
    is less indented than its code.
    """
    doc = node.body[0]
    if len(node.body) < 2 or doc.lineno == node.lineno or node.body[1].lineno <= (doc.end_lineno or 0):
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    last = node.end_lineno or node.lineno
    # A blank line under the docstring belongs to it.
    after = doc.end_lineno or doc.lineno
    while after < last and not lines[after].strip():
        after += 1
    whole = textwrap.dedent("\n".join(lines[first:last]))
    bare = textwrap.dedent("\n".join(lines[first : doc.lineno - 1] + lines[after:last]))
    for text in (whole, bare):
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return None
    return whole, bare


def _pick(choices: tuple[str, ...], key: str) -> str:
    """One of ``choices``, by a hash of ``key``: ``hash()`` differs from process to process."""
    return choices[int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % len(choices)]


def _conversation(key: str, question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(id=key, messages=messages)


def _of_item(module: str, name: str, node: _Item, lines: list[str]) -> Iterator[Conversation]:
    raw_doc = ast.get_docstring(node, clean=False)
    if raw_doc is None:
        return
    doc = inspect.cleandoc(raw_doc).strip()
    sources = _sources(node, lines) if _MIN_DOC <= len(doc) <= _MAX_DOC else None
    if sources is None:
        return
    whole, bare = sources
    if not _MIN_SOURCE <= len(whole) <= _MAX_SOURCE:
        return
    owner = name.rpartition(".")[0]
    kind = "class" if isinstance(node, ast.ClassDef) else ("method" if owner else "function")
    place = f"`{module}.{owner}`" if owner else f"`{module}`"
    fields = {"kind": kind, "place": place, "signature": _signature(node), "doc": doc, "source": bare}
    for form, questions, answer in (
        ("write", _WRITE_QUESTIONS, whole),
        ("document", _DOCUMENT_QUESTIONS, doc),
    ):
        if form == "document" and doc in bare:
            continue
        key = f"{module}:{name}:{form}"
        yield _conversation(key, _pick(questions, key).format(**fields), answer)


def _of_file(file: SourceFile) -> list[Conversation] | None:
    """The conversations of one file; None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(file.text)
            # Splitting at "\n" alone: a form feed inside a file is no line end to the parser.
            lines = file.text.split("\n")
            return [c for name, node in _walk(tree.body) for c in _of_item(file.module, name, node, lines)]
    except (SyntaxError, ValueError):
        return None


def _build(stdlib: Path | None, progress: Progress | None = None) -> tuple[dict[Split, list[Conversation]], int]:
    """All splits, free of repeated ids and answers, and the number of files that did not parse."""
    splits: dict[Split, list[Conversation]] = {}
    seen: set[str] = set()
    skipped = files = 0
    for split in get_args(Split):
        kept = splits.setdefault(split, [])
        for file in iter_files(split, stdlib=stdlib):
            files += 1
            if progress is not None:
                progress(_STAGE, files, 0)
            found = None if file.is_test else _of_file(file)
            skipped += found is None and not file.is_test
            for conversation in found or ():
                if seen.isdisjoint((conversation.id, conversation.answer)):
                    seen.update((conversation.id, conversation.answer))
                    kept.append(conversation)
    if progress is not None:
        progress(_STAGE, files, files)
    return splits, skipped


def iter_conversations(split: Split, *, stdlib: Path | None = None) -> Iterator[Conversation]:
    """The conversations of ``split``, sorted by file and then by position in it.

    Test modules give none. ``stdlib`` is the library's folder, the running interpreter's by default.
    The whole library is read whichever split is asked for, since repeated answers are dropped across
    splits; that takes a few seconds.
    """
    check_split(split)
    yield from _build(stdlib)[0][split]


def iter_source_text(split: Split, *, stdlib: Path | None = None) -> Iterator[tuple[str, str]]:
    """(module name, source) of every file of ``split``, the test suite included where it is installed.

    The names of test modules have ``test``, ``tests`` or a ``test_`` prefix among their parts.
    """
    for file in iter_files(split, stdlib=stdlib):
        yield file.module, file.text


def write_jsonl(directory: Path, *, stdlib: Path | None = None, progress: Progress | None = None) -> dict[str, int]:
    """Write ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` into ``directory``, made if missing.

    A row is ``{"id": ..., "messages": [{"role": ..., "content": ...}, ...]}``. Each file is written aside
    and renamed, so a reader sees the old one or the whole new one. Returns the rows per split, and under
    ``"skipped_files"`` how many source files did not parse. ``progress`` hears of the files read, a total of 0
    meaning that their number is not known yet.
    """
    directory.mkdir(parents=True, exist_ok=True)
    splits, skipped = _build(stdlib, progress)
    counts: dict[str, int] = {}
    for split, conversations in splits.items():
        aside = directory / f".{split}.jsonl.{os.getpid()}"
        try:
            with aside.open("w", encoding="utf-8", newline="\n") as stream:
                for conversation in conversations:
                    row = {"id": conversation.id, "messages": conversation.messages}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            aside.replace(directory / f"{split}.jsonl")
        finally:
            aside.unlink(missing_ok=True)
        counts[split] = len(conversations)
    return {**counts, "skipped_files": skipped}
