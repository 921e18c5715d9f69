"""The cells of the matrix: what each needs of the machine, and what came of those that ran.

    python ci/cells.py needs NAME          why the cell cannot run here; nothing if it can
    python ci/cells.py counted JUNIT.XML   fails if no test passed: a suite that skipped everything shows nothing
    python ci/cells.py table [--json]      every cell: PASS, FAIL, SKIP with the reason, or NOT RUN

Nothing is installed or imported to find out: hardware is looked for as the operating system shows it. tox asks through
toxfile.py before it installs anything. PROMISED="cuda npu" says what hardware a machine has: its absence is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / ".tox" / "cells"

DEVICES = ("cpu", "cuda", "npu")
ENGINES = ("hf", "vllm", "sglang")
OTHERS = ("toyhw", "ascend-contract", "lint", "types", "wheel", "docs")
CELLS = (*(f"{device}-{engine}" for device in DEVICES for engine in ENGINES), *OTHERS)

NPU_PYTHON = {"vllm": "VLLM_ASCEND_PYTHON", "sglang": "SGLANG_NPU_PYTHON"}
"""Interpreters of environments that are made by hand: neither engine's Ascend build is on a package index."""


def lacks_cuda() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA GPU: there is no nvidia-smi"
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    said = (done.stdout or done.stderr).strip().splitlines()
    return "" if done.returncode == 0 and "GPU 0" in done.stdout else f"no NVIDIA GPU: {said[0] if said else 'none'}"


def lacks_npu() -> str:
    return "" if list(Path("/dev").glob("davinci[0-9]*")) else "no Ascend NPU under /dev"


def lacks_cpu_engine() -> str:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"the engines' CPU builds are for Linux on x86_64, this is {platform.system()} on {platform.machine()}"
    return "" if (3, 11) <= sys.version_info[:2] < (3, 14) else "the engines' CPU builds are for Python 3.11 to 3.13"


def lacks_compiler() -> str:
    return "" if shutil.which(os.environ.get("CXX", "c++")) else "no C++ compiler"


def lacks(cell: str) -> str:
    """What the cell needs and this machine has not, for people; empty if it can run."""
    device, _, engine = cell.partition("-")
    if cell == "toyhw":
        return lacks_compiler()
    if engine not in ENGINES:
        return ""
    checks: list[Callable[[], str]] = []
    if device == "cpu" and engine != "hf":
        checks.append(lacks_cpu_engine)
    if device in ("cuda", "npu"):
        checks.append({"cuda": lacks_cuda, "npu": lacks_npu}[device])
    reasons = [reason for check in checks if (reason := check())]
    if device == "npu" and engine in NPU_PYTHON and not os.environ.get(NPU_PYTHON[engine]):
        reasons.append(f"{NPU_PYTHON[engine]} names no interpreter of an environment with {engine} (docs/ascend.md)")
    return "; ".join(reasons)


def promised(cell: str) -> bool:
    return cell.partition("-")[0] in os.environ.get("PROMISED", "").split()


def record(cell: str, status: str, text: str, seconds: float = 0.0) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    facts = {
        "cell": cell,
        "status": status,
        "text": text,
        "seconds": round(seconds),
        "commit": _commit(),
        "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    (RECORDS / f"{cell}.json").write_text(json.dumps(facts, indent=2) + "\n")


def counts(junit: Path) -> dict[str, int]:
    """passed, failed, skipped of pytest's JUnit file."""
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for name in total:
            total[name] += int(suite.get(name, 0))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def rows() -> list[dict[str, Any]]:
    """Every cell's last record of the present commit; NOT RUN where there is none."""
    found = []
    for cell in CELLS:
        file = RECORDS / f"{cell}.json"
        facts = json.loads(file.read_text()) if file.exists() else {}
        if facts.get("commit") != _commit():
            facts = {"cell": cell, "status": "NOT RUN", "text": lacks(cell) and f"could not run here: {lacks(cell)}"}
        found.append(facts)
    return found


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _table() -> str:
    lines = [f"{'cell':<16} {'result':<8} {'seconds':>7}  what ran, or why not"]
    for facts in rows():
        seconds = str(facts["seconds"]) if facts.get("seconds") else ""
        lines.append(f"{facts['cell']:<16} {facts['status']:<8} {seconds:>7}  {facts['text']}".rstrip())
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("needs").add_argument("cell", choices=CELLS)
    commands.add_parser("counted").add_argument("junit", type=Path)
    commands.add_parser("table").add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.command == "needs":
        print(lacks(options.cell))
        return 0
    if options.command == "counted":
        count = counts(options.junit)
        print(", ".join(f"{number} {name}" for name, number in count.items()))
        if not count["passed"]:
            print("no test passed: that shows nothing, so this cell fails", file=sys.stderr)
        return 0 if count["passed"] else 1
    print(json.dumps(rows(), indent=2) if options.json else _table())
    return 1 if any(facts["status"] == "FAIL" for facts in rows()) else 0


if __name__ == "__main__":
    sys.exit(main())
