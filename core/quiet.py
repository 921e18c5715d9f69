"""What libraries log when they are imported and nobody can do anything about, known line by line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager


class _Without(logging.Filter):
    """Lets through what does not match."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.search(record.getMessage()) is None


# torchao (0.18, with torch 2.13) tries its extensions for other devices, and torch warns of how torchao registers two
# of its classes. transformers imports torchao wherever it is installed.
_KNOWN = {
    "torchao": _Without(r"^Failed to load \S+\.so: "),
    "torch.utils._pytree": _Without(r"KernelPreference|ScaleCalculationMode"),
}


def hide_known_noise() -> None:
    """For a process of torchspec's own."""
    for name, known in _KNOWN.items():
        logging.getLogger(name).addFilter(known)


@contextmanager
def known_noise_hidden() -> Iterator[None]:
    """Inside somebody else's process, whose loggers are afterwards as they were."""
    added = [(logging.getLogger(name), known) for name, known in _KNOWN.items()]
    added = [(logger, known) for logger, known in added if known not in logger.filters]
    for logger, known in added:
        logger.addFilter(known)
    try:
        yield
    finally:
        for logger, known in added:
            logger.removeFilter(known)
