"""toyhw keeps the contract of devices; and an adapter on it that mixes places is found out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TOPICS = ("spec", "runtime", "attention", "ops", "sharing", "collectives")
"""test_toyhw.py has trainings of its own; `tox -e toyhw` makes these, too."""


def conformance(name: str, variables: dict[str, str], *topics: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "torchspec", "doctor", "--conformance", name, "--json", "--topics", *topics]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert ran.stdout, ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout)
    return told


def test_it_conforms(installed: dict[str, str]) -> None:
    told = conformance("toyhw", installed, *TOPICS)
    assert {each["check"]: each["text"] for each in told["checks"] if each["status"] != "PASS"} == {
        "ops: products of FP8 matrices": "needs the capability fp8, which is not declared"
    }
    assert told["registered_by"].startswith("torchspec-toyhw 0.1.0 (toyhw:SPEC)")


def test_an_argument_of_another_place_is_found(installed: dict[str, str], tmp_path: Path) -> None:
    described = tmp_path / "mixed-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Name: mixed\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[torchspec.devices]\ntoyhw_mixed = toyhw_mixed:SPEC\n")
    path = os.pathsep.join([installed["PYTHONPATH"], str(tmp_path), str(Path(__file__).parent)])
    told = conformance("toyhw_mixed", {**installed, "PYTHONPATH": path}, "attention")
    assert {each["status"] for each in told["checks"]} == {"FAIL"}
    assert all("toyhw:0 and" in each["text"] for each in told["checks"]), told["checks"][0]
