"""docs/cli.md is what the parsers and the schema say."""

from __future__ import annotations

from pathlib import Path

from torchspec.cli.reference import render

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_is_current() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == render(), "run: python -m torchspec.cli.reference docs/cli.md"


def test_every_option_and_setting_is_in_it() -> None:
    page = render()
    for word in (
        "`--nproc N`",
        "`--sweep N...`",
        "`train.lr`",
        "`draft.unroll`",
        "`data.train` (`--data`)",
        "## torchspec doctor",
    ):
        assert word in page, word
