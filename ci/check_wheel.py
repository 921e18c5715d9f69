"""Can these be released? Builds sdist -> wheel (or takes --wheel): the wheel holds what git holds, the sdist nothing
else, an index takes their metadata (twine), and the changelog knows the version.

Discovery of packages over a `package-dir` table is not documented, and data files are easily forgotten.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 14


def tracked(*folders: str) -> set[str]:
    """What git holds and is there, by its path from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *folders], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def expected() -> set[str]:
    """Paths inside the wheel of every tracked file of the installed folders."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    found: set[str] = set()
    for package, folder in table.items():
        found |= {package.replace(".", "/") + "/" + str(Path(name).relative_to(folder)) for name in tracked(folder)}
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


def compare_sdist(sdist: Path) -> list[str]:
    """What the sdist holds beside git's files and what the build writes, in words."""
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    written = {"PKG-INFO", "setup.cfg"}
    added = (name for name in held - tracked() - written if ".egg-info/" not in name)
    return [f"in the sdist but not in git: {name}" for name in sorted(added)]


def metadata(files: list[Path]) -> list[str]:
    """What an index would refuse, and a version that the changelog does not know."""
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    problems = [] if done.returncode == 0 else [f"twine check: {(done.stdout + done.stderr).strip()}"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if not re.search(rf"^## {re.escape(version)} \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        problems.append(f"CHANGELOG.md has no section `## {version} (date)`")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, help="check this one instead of building")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        wheel = options.wheel or build(Path(directory))
        built = sorted(Path(directory).iterdir()) or [wheel]
        problems = compare(wheel) + metadata(built)
        problems += [problem for file in built if file.name.endswith(".tar.gz") for problem in compare_sdist(file)]
        print(f"{wheel.name}: {len(expected())} tracked files, {wheel.stat().st_size / 2**20:.1f} MB")
    print("\n".join(problems) or "the wheel holds exactly what git holds, and can be released")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
