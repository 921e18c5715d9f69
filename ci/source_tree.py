"""Lays the folders of the repository out as the one package they install as, for tools that read files.

`core/`, `backends/`, `devices/` and `src/torchspec/` become `.tree/torchspec/...` through symbolic links, after
the `package-dir` table of pyproject.toml. Type checkers and import-linter don't understand the import hook of an
editable install; they understand this folder. Prints its path.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_tree(tree: Path) -> Path:
    """Make or refresh the links under `tree`; returns `tree`."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    (tree / "torchspec").mkdir(parents=True, exist_ok=True)
    for stale in (tree / "torchspec").iterdir():
        stale.unlink()
    for name, folder in table.items():
        if "." in name:
            tree.joinpath(*name.split(".")).symlink_to(ROOT / folder)
            continue
        for item in (ROOT / folder).iterdir():
            if item.name != "__pycache__":
                (tree / name / item.name).symlink_to(item)
    return tree


if __name__ == "__main__":
    print(link_tree(ROOT / ".tree"))
