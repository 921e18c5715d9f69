"""Checks of a subject that does all that an adapter must not; run apart by test_apart.py."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from torchspec.core.conformance.apart import answer
from torchspec.core.conformance.checks import Check, NotHereError


def dies(subject: str) -> str:
    print("about to fall over", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return "never"


def leaves(subject: str) -> str:
    os._exit(3)


def hangs(subject: str) -> str:
    time.sleep(600)
    return "never"


def prints(subject: str) -> str:
    print('{"began": "nonsense"}', flush=True)
    return f"measured with {subject}"


def breaks(subject: str) -> str:
    raise AssertionError("seven is not eight")


def fails(subject: str) -> str:
    return {}["no such key"]


def is_missing(subject: str) -> str:
    raise NotHereError("needs two moons")


CHECKS = (
    Check("first: prints", prints),
    Check("first: dies", dies),
    Check("first: breaks", breaks),
    Check("first: hangs", hangs, seconds=1.0),
    Check("second: leaves", leaves),
    Check("second: fails", fails),
    Check("second: is missing", is_missing),
    Check("second: prints", prints),
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("subject")
    parser.add_argument("checks", nargs="*")
    options = parser.parse_args()

    def load() -> str:
        if options.subject == "none":
            raise OSError("there is no subject")
        if options.subject == "slow":
            time.sleep(600)
        return str(options.subject)

    answer(options.descriptor, options.checks, CHECKS, load)
