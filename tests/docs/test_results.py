"""docs/results.md shows what benchmarks/results/algorithms.json holds."""

from __future__ import annotations

import json
from pathlib import Path

from torchspec.cli.comparison import markdown

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_that_of_the_measured_figures() -> None:
    measured = json.loads((ROOT / "benchmarks/results/algorithms.json").read_text())
    assert markdown(measured) in (ROOT / "docs/results.md").read_text()
