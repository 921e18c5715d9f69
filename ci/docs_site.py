"""A hook of mkdocs: the site is laid out as the repository, so a relative link is right there and on GitHub alike.

Pages keep their paths (`docs/training.md`, `README.md` as the first page), and so do the files that they link to, which
`extra.published` of mkdocs.yml lists as patterns. Nothing is rewritten: a link to what is not published is a warning of
mkdocs, and `--strict` fails. Browsers download sources instead of showing them, so these get `.txt` at the end.

The reference of the API is read from the working tree, laid out as it installs.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from source_tree import ROOT, link_tree

SHOWN_AS_TEXT = {".py", ".yaml", ".yml", ".toml"}

_trees: list[str] = []


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    _trees.append(tempfile.mkdtemp(prefix="torchspec-docs-"))
    handlers = config.plugins["mkdocstrings"].config["handlers"]
    handlers["python"]["paths"] = [str(link_tree(Path(_trees[-1])))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Everything of docs/ and what `published` names, by its path from the root of the repository."""
    docs = Path(config.docs_dir)
    kept = [file for file in files if file.src_dir != config.docs_dir]
    named = [(docs / file.src_uri).relative_to(ROOT) for file in files if file.src_dir == config.docs_dir]
    for pattern in config.extra["published"]:
        found = [path.relative_to(ROOT) for path in sorted(ROOT.glob(pattern)) if path.is_file()]
        if not found:
            raise ValueError(f"mkdocs.yml: extra.published has {pattern}, and nothing in the repository is called so")
        named += found
    return Files([*kept, *(_file(path, config) for path in dict.fromkeys(named))])


def _file(path: Path, config: MkDocsConfig) -> File:
    dest = f"{path.as_posix()}.txt" if path.suffix in SHOWN_AS_TEXT else None
    return File(
        path.as_posix(),
        src_dir=str(ROOT),
        dest_dir=config.site_dir,
        use_directory_urls=config.use_directory_urls,
        dest_uri=dest,
    )


def on_shutdown() -> None:
    for tree in _trees:
        shutil.rmtree(tree, ignore_errors=True)
    _trees.clear()
