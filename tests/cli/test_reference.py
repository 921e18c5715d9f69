"""docs/cli.md and docs/configuration.md are what the parsers and the schema say."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.cli.reference import render, render_settings
from torchspec.core import registry
from torchspec.core.config.fields import settings
from torchspec.core.config.schema import run_schema

ROOT = Path(__file__).resolve().parents[2]


PAGES = {"cli.md": render, "configuration.md": render_settings}


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_is_current(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == PAGES[name](), "run: python -m torchspec.cli.reference docs/cli.md"


def test_every_option_and_setting_is_in_it() -> None:
    for word in ("`--nproc N`", "`--sweep N...`", "## torchspec doctor"):
        assert word in render(), word
    page = render_settings()
    for word in ("`train.lr`", "`draft.unroll`", "`data.train` (`--data`)", "## draft, with algorithm dflash"):
        assert word in page, word
    assert page.count("`eval.serving.python`") == 1
    assert "< 2**63" in page
    for algorithm in registry.algorithms().names():
        for path in settings(run_schema(registry.algorithms().spec(algorithm).options)):
            assert f"| `{path}`" in page, path
