"""Waiting with a deadline, and with a word of what is waited for."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import TypeVar

from torchspec.core.errors import TargetError

logger = logging.getLogger(__name__)

FIRST_WORD, BETWEEN_WORDS = 15.0, 30.0

Result = TypeVar("Result")


def awaited(work: Future[Result], what: str, start: float, patience: float, late: str) -> Result:
    """The result. TargetError when it is not there `patience` seconds after `start` (a time of time.monotonic());
    `late` says what to look at then."""
    pause = FIRST_WORD
    while True:
        passed = time.monotonic() - start
        try:
            return work.result(timeout=max(0.0, min(pause, patience - passed)))
        except NotYet:
            if work.done():
                raise  # of the work itself
            passed = time.monotonic() - start
            if passed >= patience:
                raise TargetError(f"{what} did not come within {passed:.0f} s: {late}") from None
            logger.info("waiting for %s, %.0f s of at most %.0f s", what, passed, patience)
            pause = BETWEEN_WORDS
