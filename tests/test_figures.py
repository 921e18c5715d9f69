"""The README's figures are those of the committed measurements, and these are what the recipes promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("name", "least"), [("embedded_quickstart", 1.8), ("embedded_full_recipe", 2.5)])
def test_figures(name: str, least: float) -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    text = " ".join((ROOT / "README.md").read_text().split())
    lookup = figures["prompt_lookup"]["acceptance_length"]
    [fastest] = [entry for entry in figures["sweep"] if entry["draft_length"] == figures["best_draft_length"]]
    assert figures["lossless"]
    assert figures["draft_length"] == 5
    assert figures["acceptance_length"] >= max(least, lookup + 0.3)
    assert figures["acceptance_length"] == pytest.approx(1 + sum(figures["acceptance_per_position"]))
    assert fastest["speedup"] > 1
    assert f"**{figures['acceptance_length']:.2f}** tokens per round" in text
    assert f"on {figures['prompts']} held-out questions" in text
    assert f"**{fastest['speedup']:.2f} times** faster with a chain of {fastest['draft_length']}" in text
    assert f"prompt lookup accepts {lookup:.2f}" in text
    assert f"benchmarks/results/{name}.json" in text
