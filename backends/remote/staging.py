"""The worker's code for an engine's environment: this very torchspec, as a folder to put on PYTHONPATH.

Nothing has to be installed into the engine's environment, so any will do, and both ends of the protocol are always of
one version. The folder holds the modules alone (not what torchspec depends on) and a description by which plug-in
systems find entry points, as those of an installed distribution.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import torchspec
from torchspec import backends, core
from torchspec.core.settings import cache_dir

PACKAGES = {"torchspec/core": core, "torchspec/backends": backends}
PLUGIN_GROUPS = ("sglang.srt.plugins",)


def stage() -> Path:
    """The folder, made on first use and whenever torchspec's code is another; several may be made at a time."""
    files = _files()
    digest = hashlib.blake2b(digest_size=8)
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    place = cache_dir() / "worker" / digest.hexdigest()
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
    try:
        for name, content in files.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        aside.chmod(0o755)
        try:
            aside.rename(place)
        except OSError:
            if not place.is_dir():  # else another process made the same one
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return place


def _files() -> dict[str, bytes]:
    """Path under the folder -> content."""
    assert torchspec.__file__ is not None
    found = {"torchspec/__init__.py": Path(torchspec.__file__).read_bytes()}
    for prefix, package in PACKAGES.items():
        for folder in package.__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                found[f"{prefix}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    described = f"torchspec-{torchspec.__version__}.dist-info"
    found[f"{described}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: torchspec\nVersion: {torchspec.__version__}\n"
    ).encode()
    found[f"{described}/entry_points.txt"] = _entry_points().encode()
    return found


def _entry_points() -> str:
    """torchspec's own plug-ins for engines, as its installation declares them."""
    lines = []
    for group in PLUGIN_GROUPS:
        lines.append(f"[{group}]")
        lines += [
            f"{entry.name} = {entry.value}"
            for entry in metadata.distribution("torchspec").entry_points
            if entry.group == group
        ]
    return "\n".join(lines) + "\n"
