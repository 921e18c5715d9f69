"""Pages of the documentation, and readers who type what they say."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
POSITIONS = 4096


def _load(path: Path) -> ModuleType:
    """A module that no package holds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BLOCKS, SMALL, READER = (_load(path) for path in (ROOT / "ci/doc_blocks.py", HERE / "small.py", HERE / "reader.py"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "page" in metafunc.fixturenames:
        pages = BLOCKS.pages()
        metafunc.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


@pytest.fixture(scope="session")
def doc_blocks() -> ModuleType:
    """ci/doc_blocks.py."""
    return BLOCKS


@pytest.fixture(scope="session")
def readers_target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with room for the default lengths."""
    folder = tmp_path_factory.mktemp("readers") / "target"
    shutil.copytree(tiny_target, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))
    return folder


@pytest.fixture(scope="session")
def readers_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers_cache")


@pytest.fixture
def reader(tmp_path: Path, readers_cache: Path, readers_target: Path) -> Iterator[Any]:
    """A Reader in an empty folder."""
    folder = tmp_path / "reader"
    folder.mkdir()
    made = READER.Reader(folder, readers_cache, readers_target, (BLOCKS, SMALL))
    yield made
    made.leave()
