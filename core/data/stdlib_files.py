"""The source files of the Python standard library, and which split each one belongs to.

The unit of a split is a *top-level module*: every file of the package ``json`` shares one split, and so
do ``_pyio`` and ``io``, and ``test_json`` and ``json``. The split is a pure function of that name (see
:func:`split_of`), so it is the same on every machine and for every Python version, and a module that a
later Python adds never moves one that was there before.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]

# Chosen once, among numbered salts, so that on Python 3.10 to 3.13 either held-out split has 500 items or
# more from a dozen modules, none of them above a quarter; another would mix held-out text into training.
_SALT = "torchspec-stdlib-3976"
_TRAIN_SHARE = 0.90
_VALIDATION_SHARE = 0.05

# Not the library's own prose and code: installed packages, an application, vendored wheels, generated
# topics, demos, build configuration.
_SKIPPED_PARTS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "idlelib",
        "ensurepip",
        "pydoc_data",
        "turtledemo",
        "lib-dynload",
        "__pycache__",
        "__phello__",
    }
)
# Near copies of one another, so they share a split.
_SAME = {"ntpath": "posixpath", "sre_compile": "re", "sre_constants": "re", "sre_parse": "re"}
_TEST_PARTS = frozenset({"test", "tests", "idle_test"})
_TABLE_MARKER = re.compile(r"^(decoding_table|decoding_map)\s*=", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One readable source file of the library."""

    module: str  # dotted name, "json.decoder"; a package's __init__.py has the package's name
    text: str
    is_test: bool


def stdlib_folder() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def check_split(split: str) -> None:
    """Raise ``ValueError`` unless ``split`` is one of the three names."""
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; choose one of {', '.join(get_args(Split))}")


def top_level_name(module: str, known: frozenset[str] = frozenset()) -> str:
    """The name whose hash decides the split of ``module``.

    Leading underscores and a ``_py`` prefix go (``_pydecimal`` is ``decimal``). A module of the test
    suite is named after what it tests: the longest name in ``known`` that starts the rest of its name
    (``test.test_urllib2net`` is ``urllib``), or the whole rest where there is none.
    """
    parts = module.split(".")
    if parts[0] == "test" and len(parts) > 1:
        subject = parts[1].removeprefix("test_").lstrip("_")
        starts = [name for name in known if subject.startswith(name)]
        name = max(starts, key=len, default=subject)
        return _SAME.get(name, name)
    name = parts[0].removeprefix("_py").lstrip("_") or parts[0]
    return _SAME.get(name, name)


def split_of(name: str) -> Split:
    """The split of a top-level name: its sha256 as a number in [0, 1), cut at 0.90 and 0.95."""
    digest = hashlib.sha256(f"{_SALT}:{name}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < _TRAIN_SHARE:
        return "train"
    return "validation" if position < _TRAIN_SHARE + _VALIDATION_SHARE else "test"


def _is_wanted(parts: tuple[str, ...]) -> bool:
    """Whether the path (relative, in parts) is library text or a ``test_*`` module of the test suite."""
    if any(part in _SKIPPED_PARTS or part.startswith("config-") for part in parts):
        return False
    # Helpers of the test suite (pickletester.py, ...) do not say which module they exercise.
    return parts[0] != "test" or (len(parts) > 1 and parts[1].startswith("test_"))


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def iter_files(split: Split, *, stdlib: Path | None = None) -> Iterator[SourceFile]:
    """The files of ``split`` in sorted order of their paths.

    Files that are not UTF-8 and generated tables (the charmaps of ``encodings``) are left out.
    ``stdlib`` is the library's folder, the running interpreter's by default.
    """
    check_split(split)
    root = stdlib_folder() if stdlib is None else stdlib
    if not root.is_dir():
        raise ValueError(f"stdlib is {str(root)!r}, which is not a directory")
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    wanted = [path for path in paths if _is_wanted(path.parts)]
    known = frozenset(top_level_name(_module_name(path)) for path in wanted if path.parts[0] != "test")
    for path in wanted:
        module = _module_name(path)
        if split_of(top_level_name(module, known)) != split:
            continue
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and not _TABLE_MARKER.search(text):
            is_test = bool(_TEST_PARTS.intersection(path.parts)) or path.name.startswith("test_")
            yield SourceFile(module=module, text=text, is_test=is_test)
