"""The blocks of the documentation: which there are, what runs them, and what is wrong with them as they stand.

A block is fenced. Shell and Python blocks are run by tests/docs, block after block of a page in one folder, unless a
comment before the fence says why not (CONTRIBUTING.md, "Commands in the documentation"):

    <!-- needs: gpu -->                  what no test machine has; the block is checked as far as that goes
    <!-- tested: tests/x/test_y.py -->   that test runs it
    <!-- exit: 2 -->                     the last command is shown failing, with this code

`<!-- setup: bash` (or `python`), lines, `-->` is a block that readers do not see. `wrong` holds what is checked of
every block, run or not.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from torchspec.cli import COMMANDS
from torchspec.cli.options import is_override
from torchspec.core import registry
from torchspec.core.config.fields import settings
from torchspec.core.config.load import load_config
from torchspec.core.config.schema import RunConfig, run_schema
from torchspec.core.errors import ConfigError, Problem, TorchspecError

ROOT = Path(__file__).resolve().parent.parent
SHELL = ("bash", "sh", "console")
TEXT = ("", "text", "mermaid", "jinja", "html", "diff")
LANGUAGES = (*SHELL, "python", "yaml", "json", "jsonl", "toml", *TEXT)
NEEDS = {
    "gpu": "an NVIDIA GPU",
    "npu": "an Ascend NPU",
    "cluster": "several machines, or a service on another one",
    "hub": "the network: a package index, a model hub, a tracker",
    "engine": "vLLM or SGLang in an environment of its own",
    "weights": "a real target, larger than a test's",
    "long": "minutes",
    "yours": "code, hardware or files of the reader's own",
    "ray": "Ray; run where it is installed",
    "mooncake": "Mooncake's client; run where it is installed",
}
INSTALLED = {"ray": "ray", "mooncake": "mooncake.store"}
"""Words of NEEDS that a test machine may have, by the module that shows it."""
MARKS = ("needs", "tested", "exit")

_COMMENT = re.compile(r"<!--\s*(\w+):\s*(.*?)\s*-->", re.DOTALL)
_FENCE = re.compile(r"^( *)```([\w+-]*)[^\n]*$")
_SPAN = re.compile(r"(?<!`)`(torchspec [^`\n]+)`(?!`)")
_TYPED = re.compile(
    rf"^ *(\$ )?((torchspec ({'|'.join(COMMANDS)})|pip3? install|python3?|pytest|torchrun|ci/\w+)( |$))"
)
_OPERATOR = re.compile(r"^[|&;<>()]+$")
_STATE = ("cd", "export", "source", ".", "set", "if", "for", "while", "function", "case", "{", "}")


@dataclass(frozen=True, kw_only=True)
class Block:
    """`line` is that of its first line of text, from 1; `needs`, `tested` and `exit_code` are what its marks say."""

    page: Path
    line: int
    language: str
    text: str
    needs: tuple[str, ...] = ()
    tested: str | None = None
    exit_code: int = 0
    hidden: bool = False

    @property
    def place(self) -> str:
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is code that the test of its page runs, on a machine that has what it needs."""
        return self.language in (*SHELL, "python") and self.tested is None


def pages() -> list[Path]:
    """Those that people read, this repository's own alone."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ci" / "README.md"]
    for folder in ("docs", "examples", "benchmarks"):
        found += sorted((ROOT / folder).rglob("*.md"))
    return [path for path in found if "node_modules" not in path.parts and path.exists()]


def blocks(page: Path) -> list[Block]:
    """Fenced blocks and set-up comments, in order, with the marks before them. ValueError: a mark nobody knows."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    marks: dict[str, str] = {}
    number = 0
    while number < len(lines):
        line = lines[number]
        opened = _FENCE.match(line)
        if line.lstrip().startswith("<!--"):
            last = next(n for n in range(number, len(lines)) if "-->" in lines[n])
            comment = _COMMENT.search("\n".join(lines[number : last + 1]))
            if comment and comment[1] == "setup":
                language, _, text = comment[2].partition("\n")
                found.append(Block(page=page, line=number + 2, language=language.strip(), text=text, hidden=True))
            elif comment and comment[1] in MARKS:
                marks[comment[1]] = comment[2]
            number = last
        elif opened:
            last = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == "```"), len(lines))
            text = "\n".join(body.removeprefix(opened[1]) for body in lines[number + 1 : last])
            found.append(_marked(page, number + 2, opened[2], text, marks))
            marks, number = {}, last
        elif line.strip() and marks:
            raise ValueError(f"{page.name}:{number + 1}: a mark ({', '.join(marks)}) stands before no fence")
        number += 1
    return found


def _marked(page: Path, line: int, language: str, text: str, marks: dict[str, str]) -> Block:
    words = re.sub(r"\(.*?\)", "", marks.get("needs", ""), flags=re.DOTALL)  # a reason may stand in parentheses
    needs = tuple(word.strip() for word in words.split(",") if word.strip())
    unknown = [word for word in needs if word not in NEEDS]
    if unknown:
        raise ValueError(f"{page.name}:{line}: needs: {', '.join(unknown)}: the words are {', '.join(NEEDS)}")
    code = marks.get("exit", "0")
    if not code.isdecimal():
        raise ValueError(f"{page.name}:{line}: exit: {code} is not a number")
    return Block(
        page=page,
        line=line,
        language=language,
        text=text,
        needs=needs,
        tested=marks.get("tested"),
        exit_code=int(code),
    )


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of what stands in no fence."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line) is not None
        if not inside and not fence:
            yield number, line
        inside ^= fence


def command_lines(block: Block) -> list[str]:
    """Of a shell block: each command as one line, without prompts and, in a console, without what was printed."""
    text = block.text
    if block.language == "console":
        text = re.sub(r"\\\n(?!\$ )", "\\\\\n", text)
        kept, goes_on = [], False
        for line in text.splitlines():
            if goes_on or line.startswith("$ "):
                kept.append(line.removeprefix("$ "))
                goes_on = line.endswith("\\")
        text = "\n".join(kept)
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def script(block: Block) -> str:
    """The block as a shell reads it."""
    return "\n".join(command_lines(block)) if block.language == "console" else block.text


def is_plain(line: str) -> bool:
    """Whether a line is one command with its words: no pipe, no redirection, nothing that later lines depend on."""
    words = _shell_words(line)
    simple = not any(_OPERATOR.match(word) for word in words) and "$(" not in line and "`" not in line
    return simple and stands_alone(line)


def stands_alone(line: str) -> bool:
    """Whether a shell of its own may run the line: it is whole, and changes nothing that the shell remembers."""
    words = _shell_words(line)
    if "<<" in line or not words or _OPERATOR.match(words[-1]):
        return False
    return words[0] not in _STATE and "=" not in words[0]


def _shell_words(line: str) -> list[str]:
    """With operators as words, without comments; none of a line whose quotation goes on."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.commenters = "#"
    reader.whitespace_split = True
    try:
        return list(reader)
    except ValueError:
        return []


def wrong(page: Path) -> list[str]:
    """What is wrong with a page's blocks and commands, whether or not anything runs them."""
    try:
        found = blocks(page)
    except ValueError as error:
        return [str(error)]
    problems = [f"{block.place}: {problem}" for block in found for problem in _wrong(block)]
    name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
    for number, line in prose(page):
        if line.startswith("    ") and _TYPED.match(line):
            problems.append(f"{name}:{number}: `{line.strip()}`: a command belongs into a fence, ```bash")
        for span in _SPAN.findall(line):
            problems += [f"{name}:{number}: `{span}`: {problem}" for problem in _wrong_words(span)]
    return problems


def _wrong(block: Block) -> Iterator[str]:
    if block.language not in LANGUAGES:
        yield f"```{block.language}: none of {', '.join(filter(None, LANGUAGES))}"
    elif block.language in SHELL:
        yield from _wrong_shell(block)
    elif block.language == "python":
        yield from _wrong_python(block.text)
    elif block.language in TEXT:
        typed = [line for line in block.text.splitlines() if _TYPED.match(line)]
        if typed:
            yield f"`{typed[0].strip()}`: a fence with commands says its language, ```bash or ```console"
    else:
        yield from _wrong_data(block)
    if block.tested is not None and not (ROOT / block.tested).is_file():
        yield f"tested: {block.tested} does not exist"


def _wrong_shell(block: Block) -> Iterator[str]:
    done = subprocess.run(["bash", "-n"], input=script(block), capture_output=True, text=True, check=False)
    if done.returncode:
        yield done.stderr.strip()
        return
    for line in command_lines(block):
        words = _words(line)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if not words:
            continue
        if "..." in words or "…" in words:
            yield f"`{line}`: write the command out, so that it can be typed"
        if words[0] == "torchspec":
            yield from (f"`{line}`: {problem}" for problem in _wrong_words(shlex.join(words)))
        else:
            yield from (f"`{line}`: {name} does not exist" for name in _missing(words))


def _words(line: str) -> list[str]:
    """Up to the first operator."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    words: list[str] = []
    try:
        for word in reader:
            if _OPERATOR.match(word):
                break
            words.append(word)
    except ValueError:  # a quotation that goes on in the next line: bash has read it
        return []
    return words


def _missing(words: Sequence[str]) -> list[str]:
    """Files of this repository that a command names and that are not there."""
    ours = re.compile(r"(\./)?(ci|tests|benchmarks|examples|docs)/[\w./-]+$")
    return [word for word in words if ours.match(word) and not (ROOT / word).exists()]


def _wrong_words(line: str) -> list[str]:
    """What of a `torchspec` command does not exist, and which values no run could have."""
    try:
        problem = wrong_command(line)
        return [problem] if problem else _wrong_values(line)
    except ConfigError as error:
        return [str(error)]
    except ValueError as error:
        return [str(error)]


def wrong_command(line: str) -> str:
    """What of a command line does not exist; values are not looked at."""
    words = [word for word in shlex.split(line.lstrip("$ "), comments=True) if word not in ("...", "…")][1:]
    if not words or words[0] in ("--help", "--version", "COMMAND"):
        return ""
    name, *rest = words
    if name not in COMMANDS:
        return f"no command {name!r}"
    command = importlib.import_module(f"torchspec.cli.commands.{name}")
    parser = command.parser()
    if hasattr(command, "parsers") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.parsers():
            return f"no word {rest[0]!r} of {name}"
        parser = command.parsers()[rest.pop(0)]
    known = {option for action in parser.listed for option in action.option_strings}
    known |= {"--traceback", "--help", "-h"}
    unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known]
    paths = {path for algorithm in registry.algorithms().names() for path in _settings(algorithm)}
    unknown += [
        word for word in rest if is_override(word) and not any(_of(word.partition("=")[0], path) for path in paths)
    ]
    return f"unknown: {', '.join(unknown)}" if unknown else ""


@cache
def _settings(algorithm: str) -> tuple[str, ...]:
    return tuple(settings(run_schema(registry.algorithms().spec(algorithm).options)))


def _of(path: str, known: str) -> bool:
    return path == known or path.startswith(f"{known}.")


def _wrong_values(line: str) -> list[str]:
    """Of `train` without a file: what its schema says to the values, on a machine that has everything."""
    words = shlex.split(line.lstrip("$ "), comments=True)[1:]
    if not words or words[0] != "train" or {"--config", "--help", "..."} & set(words):
        return []
    command = importlib.import_module("torchspec.cli.commands.train")
    values, overrides, problems = command.bare_parser().split(words[1:])
    for name in ("config", "nproc", "dry_run", "json"):
        values.pop(name)
    if values.get("algorithm", "eagle3") not in registry.algorithms().names():
        return []
    if command.OBJECTIVE in values:
        values[command.OBJECTIVE] = command.read_terms(values[command.OBJECTIVE], problems)
    return [*map(str, problems), *_faults({"flags": values, "overrides": overrides})]


def _faults(given: dict[str, object]) -> list[str]:
    """Problems of a configuration, apart from what it leaves to be said elsewhere."""
    try:
        load_config(**given, probe=False)  # type: ignore[arg-type]
    except ConfigError as error:
        return [_told(problem) for problem in error.problems if "required" not in problem.message.lower()]
    return []


def _told(problem: Problem) -> str:
    return str(ConfigError([problem]))


def _wrong_python(text: str) -> Iterator[str]:
    """Syntax, and whether what it takes from torchspec is there."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield f"line {error.lineno}: {error.msg}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torchspec":
            yield from _absent(node.module or "", [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "torchspec":
                    yield from _absent(alias.name, [])


def _absent(module: str, names: Sequence[str]) -> Iterator[str]:
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        yield str(error)
        return
    yield from (f"{module} has no {name}" for name in names if name != "*" and not hasattr(loaded, name))


def _wrong_data(block: Block) -> Iterator[str]:
    try:
        if block.language == "yaml":
            for document in yaml.safe_load_all(block.text):
                yield from _wrong_settings(document)
        elif block.language == "jsonl":
            for line in block.text.splitlines():
                json.loads(line or "null")
        elif block.language == "json":
            json.loads(block.text)
        else:
            tomllib.loads(block.text)
    except (yaml.YAMLError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        yield f"not {block.language}: {error}"


def _wrong_settings(document: object) -> list[str]:
    """Of a YAML document whose sections are those of a run: what the schema says to its values."""
    if not isinstance(document, dict) or not document or not set(document) <= set(RunConfig.model_fields) | {"draft"}:
        return []
    try:
        return _faults({"values": document})
    except TorchspecError as error:
        return [str(error)]
