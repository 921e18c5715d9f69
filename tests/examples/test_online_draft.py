"""The loop of examples/online_draft: a draft that is fed goes on being accepted, one that is not does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LOOP = Path(__file__).parents[2] / "examples" / "online_draft" / "loop.py"


def test_a_draft_that_follows_keeps_its_acceptance(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(LOOP), "--steps", "60", "--json", str(tmp_path / "rows.json")]
    ran = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    first, *_, last = json.loads((tmp_path / "rows.json").read_text())
    assert first["follows"] == first["frozen"] > 4
    assert last["reward"] > first["reward"] + 0.4
    assert last["follows"] > 4
    assert last["frozen"] < 2
