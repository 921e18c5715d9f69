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
    assert f"on {figures['prompts']} held-out prompts" in text
    assert f"**{fastest['speedup']:.2f} times** faster with draft length {fastest['draft_length']}" in text
    assert f"prompt lookup accepts {lookup:.2f}" in text
    assert f"benchmarks/results/{name}.json" in text


def test_the_steps_figures_keep_their_limits_and_stand_in_its_page() -> None:
    """The limits that are met; docs/step.md says which is not."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())
    runs = {(run["settings"]["tokens"], run["settings"]["supervised"]): run for run in figures["runs"]}
    page = (ROOT / "docs" / "step.md").read_text()
    assert runs.keys() == {(tokens, share) for tokens in (512, 2048, 8192) for share in (1.0, 0.1)}
    for (tokens, share), run in runs.items():
        again = run["checkpointed"]
        row = f"| {tokens} | {share:.0%} | {run['cpu_seconds']:.2f} | {run['floor_cpu_seconds']:.2f} | "
        row += f"{run['over_floor']:.2f} | {run['peak_mb_over_base']:.0f} | "
        assert row + f"{again['over_floor']:.2f} | {again['peak_mb_over_base']:.0f} |" in page
    dense, sparse, long = runs[2048, 1.0], runs[2048, 0.1], runs[8192, 1.0]
    assert dense["over_floor"] <= 1.10
    assert long["over_floor"] <= 1.15
    assert dense["floor"]["share_of_best"] >= 0.85
    assert (dense["peak_mb_over_base"] <= 450, dense["checkpointed"]["peak_mb_over_base"] <= 230) == (True, True)
    assert long["peak_mb_over_base"] < 4000
    assert sparse["cpu_seconds"] <= 0.45 * dense["cpu_seconds"]
    assert dense["attention"]["ratio"] <= 1.10
    assert f"{dense['loss']['ratio']:.2f} times its own" in page


def test_shared_sequences_keep_their_limits_and_stand_in_their_page() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "usp.json").read_text())
    page = (ROOT / "docs" / "long-sequences.md").read_text()
    shapes = {(row["ulysses"] * row["ring"], row["exchange"]): row for row in figures["shapes"]}
    assert {(2, "ring"), (4, "ring"), (4, "usp"), (4, "ulysses"), (4, "gather")} <= shapes.keys()
    for (ranks, exchange), row in shapes.items():
        name = exchange if ranks > 1 else "-"
        told = f"| {row['ulysses']} x {row['ring']} | {name} | {row['sequence_part_mb']:.0f} | "
        assert told + f"{row['times_ranks_over_one']:.2f} | {row['sent_mb']:.1f} |" in page
        assert row["times_ranks_over_one"] <= 1.10
        assert row["sent_mb"] == row["formula_mb"]
    balance = figures["balance"]
    for ranks in ("2", "4", "8", "16"):
        packed = balance["zigzag, packed"][ranks]
        shares = (balance["contiguous"][ranks]["ring"], balance["zigzag"][ranks]["ring"], *packed.values())
        assert f"| {ranks} | " + " | ".join(f"{share:.0%}".replace("%", " %") for share in shares) + " |" in page


def test_no_random_configuration_of_shared_sequences_hung_or_differed() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "usp_stress.json").read_text())
    assert (figures["ranks"], figures["configurations"], figures["equal"]) == (8, 200, 200)
    assert figures["worst_relative_difference"] <= figures["limit"] <= 1e-11


def test_a_long_step_took_what_was_planned() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "usp_long.json").read_text())
    page = " ".join((ROOT / "docs" / "long-sequences.md").read_text().split())
    assert "--long 131072" in figures["command"]
    assert figures["sent_mb"] == figures["formula_mb"]
    assert figures["measured_over_planned"] == pytest.approx(1, abs=0.15)
    measured, planned = figures["peak_mb_over_base"] / 1e3, figures["planned_mb"] / 1e3
    assert f"{measured:.1f} GB per rank over its base; the planner says {planned:.1f} GB" in page
