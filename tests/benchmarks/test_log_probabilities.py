"""The benchmark of log-probabilities runs, its two forms agree, and its page holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "log-probabilities.md"


def test_the_benchmark_runs_and_writes_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "log_probabilities.py"), "--json", str(path)]
    sizes = ["--tokens", "70", "--vocabulary", "300", "--hidden", "16", "--rounds", "1", "--cases", "hidden+entropy"]
    # The script imports its neighbours, which the suite's safe path would hide.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert [(row["form"], row["entropy"]) for row in figures["rows"]] == [("hidden", True)]
    assert figures["settings"]["tokens"] == 70
    assert all(row["times_plain"] > 0 for row in figures["rows"])


def test_the_figures_stand_in_the_page_and_keep_their_limits() -> None:
    """Less memory than the plain form, and with entropy less time."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "log_probabilities.json").read_text())
    page = PAGE.read_text()
    assert f"torch {figures['machine']['torch'].split('+')[0]}" in page
    assert len(figures["rows"]) == 4
    for row in figures["rows"]:
        plain, ours = row["plain"], row["ours"]
        told = f"| {row['form']} | {'yes' if row['entropy'] else 'no'} | {plain['cpu_seconds']:.2f} | "
        told += f"{ours['cpu_seconds']:.2f} | {row['times_plain']:.2f} | {plain['peak_mb_over_base']:.0f} | "
        assert told + f"{ours['peak_mb_over_base']:.0f} | {row['memory_of_plain']:.2f} |" in page
        assert row["memory_of_plain"] < 0.5
        assert not row["entropy"] or row["times_plain"] < 1


def test_the_pages_examples_run(tmp_path: Path) -> None:
    alone, shared = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name, text in (("alone", alone), ("shared", shared)):
        (tmp_path / f"{name}.py").write_text(text)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in ([str(tmp_path / "alone.py")], [*launcher, str(tmp_path / "shared.py")]):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
