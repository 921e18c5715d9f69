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
    folder = directory / f"{_FOLDER}{step}"
    aside = directory / f".{secrets.token_hex(4)}"
    try:
        aside.mkdir(parents=True)
        save_files(algorithm.to_files(stored_state(state, dtype), algorithm.layouts[0]), aside)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier session
        aside.rename(folder)
        aside.write_text(folder.name)
        aside.replace(directory / CURRENT)
    except OSError as error:
        raise CheckpointError(f"cannot hand the draft over in {directory}: {error.strerror or error}") from error
    steps = sorted(int(path.name.removeprefix(_FOLDER)) for path in directory.glob(f"{_FOLDER}*"))
    kept = [each for each in steps if each <= step][-KEPT:]
    for old in set(steps) - set(kept):
        shutil.rmtree(directory / f"{_FOLDER}{old}", ignore_errors=True)


class PushedDraft:
    """Follows the drafts in `directory`. `head` is asked for the target's head once, when the first draft is there."""

    def __init__(
        self, directory: Path, target: TargetSpec, head: Callable[[], TargetHead], device: Device, place: torch.device
    ) -> None:
        """Drafts live on `place`, a torch device of `device`."""
        self._directory, self._target, self._device, self._place = directory, target, device, place
        self._load_head = head
        self._head: TargetHead | None = None
        self._name = ""
        self._drafter: Drafter | None = None

    def drafter(self) -> Drafter | None:
        """With the newest draft; None before the first one."""
        for attempt in (1, 2):  # what was named when it was read may be gone by now, and then there is a newer one
            try:
                name = (self._directory / CURRENT).read_text().strip()
            except FileNotFoundError:
                break
            if name == self._name:
                break
            try:
                self._drafter = self._loaded(self._directory / name)
                self._name = name
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
