"""The draft of a training, for those who decode with it meanwhile: handed over whole, read when it is a new one.

A directory holds the newest drafts, each a folder `step-N` as the algorithm exports it, and a file that names the one
to use. Readers may be on other machines that share the file system.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from torchspec.core.errors import CheckpointError
from torchspec.core.export.layout import read_draft, save_files, stored_state
from torchspec.core.interfaces.algorithm import Algorithm, Drafter
from torchspec.core.interfaces.device import Device
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import TargetHead

logger = logging.getLogger(__name__)

CURRENT = "current"
KEPT = 2
"""One may be read while the next appears."""
_FOLDER = "step-"


def push(
    directory: Path, algorithm: Algorithm, state: Mapping[str, Tensor], step: int, dtype: torch.dtype = torch.float32
) -> None:
    """Make the draft with this (unsharded) state the one to use. CheckpointError when it cannot be written."""
    folder = _folder(directory, step)
    aside = directory / f".{secrets.token_hex(4)}"
    try:
        aside.mkdir(parents=True)
        save_files(algorithm.to_files(stored_state(state, dtype), algorithm.layouts[0]), aside)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier session
        aside.rename(folder)
        _name(directory, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"cannot hand the draft over in {directory}: {error}") from error
    for old in _steps(directory)[:-KEPT]:
        shutil.rmtree(_folder(directory, old), ignore_errors=True)


def return_to(directory: Path, step: int) -> None:
    """Make the draft of this step the one to use again; none where it is not there. Later ones go."""
    folder = _folder(directory, step)
    if folder.is_dir():
        _name(directory, folder)
    else:
        (directory / CURRENT).unlink(missing_ok=True)
    for later in [each for each in _steps(directory) if each > step]:
        shutil.rmtree(_folder(directory, later), ignore_errors=True)


def _folder(directory: Path, step: int) -> Path:
    return directory / f"{_FOLDER}{step}"


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix(_FOLDER)) for path in directory.glob(f"{_FOLDER}*"))


def _name(directory: Path, folder: Path) -> None:
    aside = directory / f".{secrets.token_hex(4)}"
    aside.write_text(folder.name)
    aside.replace(directory / CURRENT)


class PushedDraft:
    """Follows the drafts in `directory`. `head` is asked for the target's head once, when the first draft is there."""

    def __init__(
        self, directory: Path, target: TargetSpec, head: Callable[[], TargetHead], device: Device, place: torch.device
    ) -> None:
        """Drafts live on `place`, a torch device of `device`."""
        self._directory, self._target, self._device, self._place = directory, target, device, place
        self._load_head = head
        self._head: TargetHead | None = None
        self._seen = ("", 0)  # its name, and when it was written: a run that goes on writes the same names again
        self._drafter: Drafter | None = None

    def drafter(self) -> Drafter | None:
        """With the draft that is named; None where none is."""
        for attempt in (1, 2):  # what was named when it was read may be gone by now, and then there is a newer one
            try:
                name = (self._directory / CURRENT).read_text().strip()
            except FileNotFoundError:
                return None
            try:
                seen = (name, (self._directory / name).stat().st_mtime_ns)
                if seen != self._seen:
                    self._drafter = self._loaded(self._directory / name)
                    self._seen = seen
                break
            except (CheckpointError, OSError) as error:
                if attempt == 2:
                    logger.warning("going on with the draft before %s: %s", name, error)
        return self._drafter

    def _loaded(self, folder: Path) -> Drafter:
        if self._head is None:
            self._head = self._load_head()
        with torch.random.fork_rng(devices=()):  # building it draws what it then throws away
            algorithm, draft = read_draft(folder, self._target)
        draft = draft.to(self._place).requires_grad_(requires_grad=False).eval()
        return algorithm.drafter(draft, self._head, self._device)
