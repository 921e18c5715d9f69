"""Every command and program of the documentation is run, or says what it needs and is checked as far as that goes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def test_a_page_holds(page: Path, doc_blocks: ModuleType) -> None:
    """Options, settings and their values, names of files, programs and data, run or not."""
    problems = doc_blocks.wrong(page)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_what_a_page_says_can_be_typed(page: Path, doc_blocks: ModuleType, reader: Any) -> None:
    for block in doc_blocks.blocks(page):
        if block.runs and all(_is_here(word, doc_blocks.INSTALLED) for word in block.needs):
            reader.run(block)


def _is_here(word: str, installed: dict[str, str]) -> bool:
    if word not in installed:
        return False
    try:
        return importlib.util.find_spec(installed[word]) is not None
    except ModuleNotFoundError:
        return False
