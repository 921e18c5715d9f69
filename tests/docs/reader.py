"""Somebody who types what a page says, block after block, in an empty folder with a target in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torchspec.cli import main

LIMIT = 300.0
KEPT = 600
"""Rows of what `prepare` writes; the rest is cut, since each command would read it all."""
SPLITS = ("train", "validation", "test")
CONVERSATIONS = ("conversations", "prompts", "train", "held_out", "answers", "texts")
"""Names of .jsonl files that readers are taken to have, beside the target DIR and a run.yaml that trains on them."""
RUN = """\
target: {path: DIR}
data: {train: [train.jsonl], max_length: 256}
output: runs/mine
"""


class DocsError(Exception):
    """A block that does not do what its page says."""


class Reader:
    """`folder` is where commands run, `cache` what pages share, `parts` are doc_blocks.py and small.py."""

    def __init__(self, folder: Path, cache: Path, target: Path, parts: tuple[ModuleType, ModuleType]) -> None:
        self.folder, self.cache = folder, cache
        self.blocks, self.small = parts
        self.names: dict[str, Any] = {"__name__": "__main__"}
        (folder / "DIR").symlink_to(target)
        for name in ("examples", "benchmarks"):
            (folder / name).symlink_to(self.blocks.ROOT / name)
        self.variables = {
            "TORCHSPEC_CACHE": str(cache / "torchspec"),
            "TORCHSPEC_ENGINES": str(folder / ".engines"),
            "TORCHSPEC_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder / ".home"),
            "PATH": f"{self._tools()}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def _tools(self) -> Path:
        tools = self.folder / ".tools"
        tools.mkdir()
        program = tools / "torchspec"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "{self.small.__file__}" "$@"\n')
        program.chmod(0o755)
        return tools

    def run(self, block: Any) -> None:
        """DocsError: the place, the command, its output and what to do."""
        self._bring(block.text)
        try:
            if block.language == "python":
                self._python(block)
                return
            lines = self.blocks.command_lines(block)
            if not all(map(self.blocks.stands_alone, lines)):
                self._shell(self._named(self.blocks.script(block)), block.exit_code)
                return
            for number, line in enumerate(lines, start=1):
                self._command(self._named(line), block.exit_code if number == len(lines) else 0)
        except DocsError as error:
            needs = ", ".join(self.blocks.NEEDS)
            raise DocsError(
                f"{block.place}: {error}\n"
                "Mend the page or the code. If no test machine can run it, write before the fence what it needs, as\n"
                f"<!-- needs: gpu -->, of {needs};\n"
                "or what runs it, <!-- tested: tests/... -->. Files that the page takes for granted are made in a\n"
                "<!-- setup: bash ... --> (CONTRIBUTING.md)."
            ) from None

    def _bring(self, text: str) -> None:
        """The files of the reader's own that a block names and nothing has made yet."""
        for name in CONVERSATIONS:
            made = re.search(rf"(--output|>) *{name}\.jsonl", text)
            if not made and re.search(rf"(?<![\w/.-]){name}\.jsonl", text):
                self._conversations(self.folder / f"{name}.jsonl")
        if "run.yaml" in text and not (self.folder / "run.yaml").exists():
            (self.folder / "run.yaml").write_text(RUN)
            self._bring(RUN)

    def _conversations(self, path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in _rows(path.stem)))

    def _named(self, line: str) -> str:
        """With the newest checkpoint where the page says STEP."""

        def newest(found: re.Match[str]) -> str:
            steps = sorted((self.folder / found[1]).glob("step_*"))
            return str(steps[-1].relative_to(self.folder)) if steps else found[0]

        return re.sub(r"([\w./-]+/checkpoints)/STEP\b", newest, line)

    def _command(self, line: str, code: int) -> None:
        if not self.blocks.is_plain(line):
            self._shell(line, code)
            return
        words = shlex.split(line, comments=True)
        if words[0] != "torchspec" or self._starts_processes(words):
            self._shell(line, code)
        elif words[1:2] == ["prepare"]:
            self._prepare(words)
        else:
            if words[1:2] == ["quickstart"]:
                self._ready(Path(_option(words, "--output", "runs/quickstart")) / "data")
            self._torchspec(line, self.small.small(words[1:]), code)

    def _starts_processes(self, words: Sequence[str]) -> bool:
        return any("topology" in word for word in words) and "offline" not in words

    def _torchspec(self, line: str, words: Sequence[str], code: int) -> str:
        """In this process: most of a command's time would be imports."""
        said = io.StringIO()
        with self._here(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            found = main(words)
        self._judge(line, found, code, said.getvalue())
        return said.getvalue()

    def _shell(self, text: str, code: int) -> None:
        with self._here():
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, start_new_session=True,
            )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            raise DocsError(f"`{text}`: not done after {LIMIT:.0f} seconds") from None
        self._judge(text, process.returncode, code, said)

    def _python(self, block: Any) -> None:
        said = io.StringIO()
        try:
            program = compile(block.text, block.place, "exec")
            with self._here(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                exec(program, self.names)
        except Exception as error:  # whatever a page's program raises is its mistake  # noqa: BLE001
            where = "".join(traceback.format_exception(error)[-3:])
            raise DocsError(f"{where}\n{said.getvalue()[-2000:]}") from None

    def _judge(self, line: str, found: int, expected: int, said: str) -> None:
        if found != expected:
            raise DocsError(f"`{line}`: exit code {found}, not {expected}\n{said[-3000:]}")

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """In the folder, with its variables."""
        before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)
        try:
            with contextlib.chdir(self.folder):
                yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def _prepare(self, words: Sequence[str]) -> None:
        """Really, once for all pages."""
        made = self.cache / "stdlib"
        if not made.exists():
            self._torchspec("torchspec prepare", ["prepare", "--output", str(made)], 0)
        output = self.folder / _option(words, "--output", "data/stdlib")
        output.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            rows = (made / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (output / f"{split}.jsonl").write_text("".join(rows[:KEPT]), encoding="utf-8")

    def _ready(self, data: Path) -> None:
        """Conversations where the quick start would build them of the whole standard library."""
        for split in SPLITS:
            self._conversations(self.folder / data / f"{split}.jsonl")

    def leave(self) -> None:
        """What pages make is large: their folders go at once."""
        shutil.rmtree(self.folder)


def _option(words: Sequence[str], name: str, default: str) -> str:
    return words[words.index(name) + 1] if name in words else default


def _rows(name: str) -> Iterator[dict[str, Any]]:
    for number in range(12):
        question = {"role": "user", "content": f"What is the value of {name} {number}?"}
        answer = {"role": "assistant", "content": "The quick fox returns the value. " * (1 + number % 3)}
        yield {"id": f"{name}{number}", "messages": [question, answer]}


MakeReader = Callable[[], Reader]
