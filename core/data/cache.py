"""Where tokenised data is kept between runs, under a name that says all it depends on.

Entries are immutable and published at once, so any number of processes may look for the same one; a lock keeps
them from doing the work twice, and nothing but time is lost where it does not hold. A cache that cannot be written
or a damaged entry costs time and a warning, never the run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from torchspec.core.data.report import DatasetSettings, Progress, ProgressSink
from torchspec.core.data.token_file import FORMAT_VERSION, CorruptFileError, TokenData, open_token_file
from torchspec.core.data.tokenizer import template_digest, tokenizer_digest
from torchspec.core.models.target_processor import processor_digest
from torchspec.core.settings import cache_dir

logger = logging.getLogger(__name__)

# Raised whenever rendering, masking or filtering gives other results than before.
_RULES_VERSION = 2
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_READ = 1 << 20
_LOCK_PATIENCE_S = 3600.0
_LOCK_POLL_S = 0.2


def fingerprint(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, settings: DatasetSettings, progress: ProgressSink | None
) -> str:
    """sha256 over everything the tokenised data depends on, as hex."""
    return digest(ingredients(files, tokenizer, settings, progress))


def digest(facts: dict[str, Any]) -> str:
    """The fingerprint of these ingredients."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def ingredients(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, settings: DatasetSettings, progress: ProgressSink | None
) -> dict[str, Any]:
    """Everything the tokenised data depends on, as JSON.

    Contents and names (not directories) of the files in their order, the tokenizer, its chat template, the settings,
    the versions of the libraries that render and tokenise, and of the rules applied here.

    Not the date, even where a chat template prints it (`strftime_now`): data then keep the date of the day on which
    they were tokenised, and a run can be continued on another day.
    """
    digests = [[file.name, digest] for file, digest in zip(files, _digests(files, progress), strict=True)]
    return {**treatment(tokenizer, settings), "files": digests}


def treatment(tokenizer: PreTrainedTokenizerBase, settings: DatasetSettings) -> dict[str, Any]:
    """Of the ingredients those that are known without reading the files."""
    relevant = {name: value for name, value in asdict(settings).items() if name not in ("cache_dir", "answer_tokens")}
    if settings.answer_tokens is not None:
        relevant["prompts"] = True
    return {
        "rules": _RULES_VERSION,
        "format": FORMAT_VERSION,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template_digest(tokenizer),
        "processor": processor_digest(Path(tokenizer.name_or_path)) if tokenizer.name_or_path else None,
        "settings": relevant,
    }


def _digests(files: Sequence[Path], progress: ProgressSink | None) -> list[str]:
    watch, done, digests = Progress(progress, "hash data", sum(file.stat().st_size for file in files)), 0, []
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_READ):
                digest.update(chunk)
                done += len(chunk)
                watch.show(done)
        digests.append(digest.hexdigest())
    watch.finish()
    return digests


def entry_path(settings: DatasetSettings, name: str) -> Path:
    return (settings.cache_dir or cache_dir()) / "tokens" / f"{name}.safetensors"


def find(path: Path, progress: ProgressSink | None) -> TokenData | None:
    """The entry, or None where there is none that can be used; a damaged one is named in a warning."""
    try:
        return open_token_file(path, progress)
    except FileNotFoundError:
        return None
    except (CorruptFileError, OSError) as error:
        logger.warning("the cached tokens %s cannot be used and are made again: %s", path, error)
        return None


def writable(directory: Path) -> bool:
    """Whether entries can be written there, the directory being made if need be; a warning says why not."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{time.monotonic_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        logger.warning("tokenised data is not cached: %s cannot be written (%s)", directory, error.strerror or error)
        return False
    return True


@contextmanager
def locked(path: Path, progress: ProgressSink | None) -> Iterator[None]:
    """Hold the entry's lock, which dies with its process; without it after an hour, or where there are no locks."""
    with path.with_suffix(".lock").open("w") as file:
        watch: Progress | None = None
        patience = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                watch = watch or Progress(progress, "wait for another process", 1)
                watch.show(0)
                if time.monotonic() > patience:
                    logger.warning("another process has been tokenising the same data for an hour; doing it here too")
                    break
                time.sleep(_LOCK_POLL_S)
            except OSError:  # a file system without locks
                break
            else:
                break
        if watch:
            watch.finish()
        yield
