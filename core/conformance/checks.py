"""A check of a contract, and its result."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Subject = TypeVar("Subject")

Status = Literal["PASS", "FAIL", "SKIP"]

_FRAMES = 3


class NotHereError(Exception):
    """A check cannot be run here; says what it would need."""


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """`run` returns what it measured, in a few words, and raises AssertionError where the contract is broken, or
    NotHereError. `name` is "topic: what holds". `seconds` is its deadline."""

    name: str
    run: Callable[[Subject], str]
    seconds: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """`text`: the figure of a check that passed, else what is wrong or what is missing. `where`: the end of the
    traceback of one that failed."""

    check: str
    status: Status
    text: str
    seconds: float
    where: str = ""


def failed(check: str, error: BaseException, seconds: float) -> Result:
    text = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    where = "".join(traceback.format_tb(error.__traceback__)[-_FRAMES:])
    return Result(check=check, status="FAIL", text=text, seconds=seconds, where=where)


def perform(check: Check[Subject], subject: Subject) -> Result:
    """Run it in this process."""
    began = time.monotonic()
    try:
        figure = check.run(subject)
    except NotHereError as missing:
        return Result(check=check.name, status="SKIP", text=str(missing), seconds=time.monotonic() - began)
    except (Exception, SystemExit) as error:  # an adapter may fail in any way; that is a result  # noqa: BLE001
        return failed(check.name, error, time.monotonic() - began)
    return Result(check=check.name, status="PASS", text=figure, seconds=time.monotonic() - began)
