"""Does the wheel hold what git holds? Builds sdist -> wheel (or takes --wheel) and compares every file.

Discovery of packages over a `package-dir` table is not documented, and data files are easily forgotten.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 14


def expected() -> set[str]:
    """Paths inside the wheel of every tracked file of the installed folders."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    found: set[str] = set()
    for package, folder in table.items():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--", folder], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).exists():
                found.add(package.replace(".", "/") + "/" + str(Path(name).relative_to(folder)))
    return found


def build(directory: Path) -> Path:
    """sdist, then the wheel from the sdist: a stale build/ folder cannot bring deleted modules back."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(directory), str(ROOT)], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def compare(wheel: Path) -> list[str]:
    """Every difference, in words."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = expected()
    problems = [f"missing in the wheel: {name}" for name in sorted(wanted - held)]
    problems += [f"in the wheel but not in git: {name}" for name in sorted(held - wanted)]
    size = wheel.stat().st_size / 2**20
    if size > LIMIT_MB:
        problems.append(f"the wheel has {size:.1f} MB, more than {LIMIT_MB}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, help="check this one instead of building")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        wheel = options.wheel or build(Path(directory))
        problems = compare(wheel)
        print(f"{wheel.name}: {len(expected())} tracked files, {wheel.stat().st_size / 2**20:.1f} MB")
    print("\n".join(problems) or "the wheel holds exactly what git holds")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
