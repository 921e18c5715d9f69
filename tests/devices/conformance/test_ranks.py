"""Collectives that are wrong, found between real ranks; and devices of which there are too few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchspec.core.conformance.checks import perform
from torchspec.devices.conformance import CHECKS, subject_of


def conformance(device: str, place: Path, *topics: str) -> dict[str, Any]:
    """By the command itself, with the plug-in found through its entry point."""
    described = place / "broken-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Name: broken\nVersion: 1.0\n")
    entries = ["broken = broken_communication:SPEC", "wayward = broken_communication:WAYWARD"]
    (described / "entry_points.txt").write_text("\n".join(["[torchspec.devices]", *entries, ""]))
    environment = {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-P", "-m", "torchspec", "doctor", "--conformance", device]
    done = subprocess.run(
        [*command, "--topics", *topics, "--json"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_wrong_collectives(tmp_path: Path) -> None:
    told = conformance("broken", tmp_path, "spec", "collectives")
    status = {each["check"]: each["status"] for each in told["checks"]}
    wrong = ("all to all", "all to all, uneven", "all gather", "sums", "ring")
    assert status == {
        "spec: what is declared": "PASS",
        **{f"collectives: {name}": "FAIL" for name in wrong},
        "collectives: groups": "FAIL",
        "collectives: a silent peer": status["collectives: a silent peer"],
    }
    assert told["verdict"].startswith("device broken DOES NOT CONFORM (")
    assert told["registered_by"] == "broken 1.0 (broken_communication:SPEC)"


def test_the_direction_of_a_ring_and_its_group_are_seen(tmp_path: Path) -> None:
    """What two ranks could not tell: the way round, and the world instead of a group."""
    told = conformance("wayward", tmp_path, "collectives")
    text = {each["check"]: each["text"] for each in told["checks"] if each["status"] == "FAIL"}
    assert "wrong way" in text["collectives: ring"]
    assert "collectives: groups" in text


def test_what_needs_more_devices_is_skipped_with_the_reason() -> None:
    subject = subject_of("cpu")
    alone = replace(subject, spec=replace(subject.spec, capabilities=frozenset()))
    results = [perform(check, alone) for check in CHECKS if check.name.startswith("collectives")]
    assert {(result.status, result.text) for result in results} == {("SKIP", "needs 2 devices; 1 visible")}
