"""The cells of the matrix: what each needs of the machine, and what came of those that ran.

    python ci/cells.py needs CELL                     why the cell cannot run here; nothing if it can
    python ci/cells.py asked [CELL...]                fails if a name is no cell, or PROMISED no hardware
    python ci/cells.py counted JUNIT.XML              fails if no test passed: skipping everything shows nothing
    python ci/cells.py conformance OUT.json -- WORDS  `torchspec doctor WORDS`; its verdict is kept for the record
    python ci/cells.py table [--json] [CELL...]       every cell: PASS, FAIL, PART, SKIP with the reason, or NOT RUN;
                                                      fails if one failed, or one that is named was not run

Nothing is installed or imported to find out: hardware is looked for as the operating system shows it. tox asks through
toxfile.py before it installs anything. PROMISED="cuda npu" says what hardware a machine has: its absence is a failure.
A record holds for the very tree it was made of: the commit, what differs from it, and what git does not know.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
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


PROBE_SECONDS = 60.0


@functools.cache
def lacks_cuda() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA GPU: there is no nvidia-smi"
    # Into a file: with a driver that hangs, nvidia-smi may outlive being killed, and a pipe would be waited for.
    with tempfile.TemporaryFile("w+", errors="replace") as answer:
        try:
            asked = subprocess.Popen(["nvidia-smi", "-L"], stdout=answer, stderr=answer, stdin=subprocess.DEVNULL)
        except OSError as error:
            return f"no NVIDIA GPU: nvidia-smi does not start: {error.strerror}"
        try:
            code = asked.wait(PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            asked.kill()
            return f"no usable NVIDIA GPU: nvidia-smi did not answer within {PROBE_SECONDS:.0f} s"
        answer.seek(0)
        said = answer.read().strip()
    return "" if code == 0 and "GPU 0" in said else f"no NVIDIA GPU: {said.splitlines()[0] if said else 'none'}"


@functools.cache
def lacks_npu() -> str:
    return "" if list(Path("/dev").glob("davinci[0-9]*")) else "no Ascend NPU under /dev"


def lacks_cpu_engine() -> str:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"the engines' CPU builds are for Linux on x86_64, this is {platform.system()} on {platform.machine()}"
    return "" if (3, 11) <= sys.version_info[:2] < (3, 14) else "the engines' CPU builds are for Python 3.11 to 3.13"


def lacks_compiler() -> str:
    return "" if shutil.which(os.environ.get("CXX", "c++")) else "no C++ compiler"


def lacks_machine(cell: str) -> str:
    """The part of `lacks` that a machine has or has not, whatever is installed on it."""
    device, _, engine = cell.partition("-")
    if cell == "toyhw":
        return lacks_compiler()
    if engine not in ENGINES:
        return ""
    if device == "cpu":
        return "" if engine == "hf" else lacks_cpu_engine()
    return lacks_cuda() if device == "cuda" else lacks_npu()


def lacks(cell: str) -> str:
    """What the cell needs and this machine has not, for people; empty if it can run."""
    device, _, engine = cell.partition("-")
    variable = NPU_PYTHON.get(engine) if device == "npu" else None
    interpreter = ""
    if variable and not os.environ.get(variable):
        interpreter = f"{variable} names no interpreter of an environment with {engine} (docs/ascend.md)"
    return "; ".join(filter(None, (lacks_machine(cell), interpreter)))


def promises() -> set[str]:
    """The words of PROMISED. Raises ValueError for one that is no device."""
    words = set(os.environ.get("PROMISED", "").split())
    if unknown := sorted(words - set(DEVICES)):
        raise ValueError(f"PROMISED names {', '.join(unknown)}; choose from {', '.join(DEVICES)}")
    return words


def broken_promise(cell: str) -> str:
    """What of the promised hardware is missing for the cell; empty if nothing was promised or all is there."""
    missing = lacks_machine(cell) if cell.partition("-")[0] in promises() else ""
    return missing and f"promised (PROMISED), but {missing}"


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is no cell: tox makes an environment of any combination of its factors."""
    if unknown := [name for name in names if name not in CELLS]:
        raise ValueError(f"no such cell: {', '.join(unknown)}; choose from {', '.join(CELLS)}")


def record(cell: str, status: str, text: str, seconds: float = 0.0) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    facts = {
        "cell": cell,
        "status": status,
        "text": text,
        "seconds": round(seconds),
        "tree": tree(),
        "ended": time.time(),
        "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    whole = RECORDS / f"{cell}.json.new"
    whole.write_text(json.dumps(facts, indent=2) + "\n")
    whole.replace(RECORDS / f"{cell}.json")


def counts(junit: Path) -> dict[str, int]:
    """passed, failed, skipped of pytest's JUnit file. Raises ValueError if it cannot be read."""
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    try:
        for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
            for name in total:
                total[name] += int(suite.get(name, 0))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise ValueError(f"{junit} is no JUnit file that can be read: {error}") from error
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def _told(count: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in count.items())


def findings(folder: Path) -> str:
    """What the commands of a cell left in its folder: the tests that were counted, and the doctor's verdicts."""
    found = []
    junit = folder / "junit.xml"
    if junit.exists():
        try:
            found.append(_told(counts(junit)))
        except ValueError:
            found.append("its tests were not counted")
    for file in filter(Path.exists, (folder / "device.json", folder / "engine.json")):
        found.append(str((_read(file) or {}).get("verdict", f"no verdict on the {file.stem}")))
    return "; ".join(found)


def conformance(out: Path, words: Sequence[str]) -> int:
    """Runs `torchspec doctor WORDS --json`, keeps what it found in `out`, and prints it. The exit code: 1 if nothing
    passed, else the doctor's."""
    command = [sys.executable, "-P", "-m", "torchspec", "doctor", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    out.write_text(done.stdout)
    found = _read(out)
    if found is None or not {"checks", "verdict"} <= found.keys():
        print(done.stdout + f"no verdict: torchspec doctor ended with code {done.returncode}", file=sys.stderr)
        return done.returncode or 1
    for check in found["checks"]:
        print(f"{check['status']:<5} {check['check']}: {check['text']}")
    print(found["verdict"])
    return done.returncode or int(all(check["status"] != "PASS" for check in found["checks"]))


def rows(since: float = math.inf) -> list[dict[str, Any]]:
    """Every cell's last record of the present tree; NOT RUN where there is none. Where git cannot tell trees apart,
    only what was recorded after `since` (Unix time) is of the present one."""
    found = []
    for cell in CELLS:
        file = RECORDS / f"{cell}.json"
        facts = _read(file) or {}
        if not {"cell", "status", "text", "tree", "ended"} <= facts.keys():
            text = "its record cannot be read" if file.exists() else ""
        elif facts["tree"] != tree() or (not tree() and facts["ended"] < since):
            text = "its record is of another tree" if tree() else "without git, an older record may be of another tree"
        else:
            found.append(facts)
            continue
        missing = lacks(cell)
        text = "; ".join(filter(None, (text, missing and f"could not run here: {missing}")))
        found.append({"cell": cell, "status": "NOT RUN", "text": text})
    return found


def _read(file: Path) -> dict[str, Any] | None:
    """None if the file is absent, or no JSON object."""
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


@functools.cache
def tree() -> str:
    """The commit, and with changes a hash of them and of the files that git neither knows nor ignores. Empty if git
    cannot say."""
    try:
        commit = _git("rev-parse", "HEAD").decode().strip()
        changes = hashlib.sha256(_git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-color"))
        unknown = _git("ls-files", "--others", "--exclude-standard", "-z").split(b"\0")
    except (OSError, subprocess.CalledProcessError):
        return ""
    for name in sorted(filter(None, unknown)):
        file = ROOT / os.fsdecode(name)
        content = os.fsencode(os.readlink(file)) if file.is_symlink() else file.read_bytes() if file.is_file() else b""
        changes.update(name + b"\0" + hashlib.sha256(content).digest())
    same = changes.digest() == hashlib.sha256().digest()
    return commit if same else f"{commit}+{changes.hexdigest()[:16]}"


def _git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=True).stdout


def _table(found: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'cell':<16} {'result':<8} {'seconds':>7}  what ran, or why not"]
    for facts in found:
        seconds = str(facts["seconds"]) if facts.get("seconds") else ""
        lines.append(f"{facts['cell']:<16} {facts['status']:<8} {seconds:>7}  {facts['text']}".rstrip())
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("needs").add_argument("cell")
    commands.add_parser("asked").add_argument("cells", nargs="*")
    commands.add_parser("counted").add_argument("junit", type=Path)
    doctor = commands.add_parser("conformance")
    doctor.add_argument("out", type=Path)
    doctor.add_argument("words", nargs="+")
    table = commands.add_parser("table")
    table.add_argument("cells", nargs="*", help="judge these only")
    table.add_argument("--json", action="store_true")
    table.add_argument("--since", type=float, default=math.inf, help="without git, show what was recorded since then")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.command == "needs":
        check_names([options.cell])
        print(lacks(options.cell))
        return 0
    if options.command == "asked":
        check_names(options.cells)
        promises()
        return 0
    if options.command == "counted":
        count = counts(options.junit)
        print(_told(count))
        if not count["passed"]:
            print("no test passed: that shows nothing, so this cell fails", file=sys.stderr)
        return 0 if count["passed"] else 1
    if options.command == "conformance":
        return conformance(options.out, options.words)
    check_names(options.cells)
    found = rows(options.since)
    print(json.dumps(found, indent=2) if options.json else _table(found))
    bad = ("FAIL", "NOT RUN") if options.cells else ("FAIL",)
    return int(any(facts["status"] in bad for facts in found if facts["cell"] in (options.cells or CELLS)))


def main(words: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(words)
    try:
        return _run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
