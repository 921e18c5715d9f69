"""Checks of a subject that does all that an adapter must not; run apart by test_apart.py."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from torchspec.core.conformance.apart import answer, tied
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


def exits(subject: str) -> str:
    sys.exit("enough")


def falls_silent(subject: str) -> str:
    os.closerange(3, 256)  # the descriptor for results among them
    time.sleep(600)
    return "never"


def hangs_with_a_child(subject: str) -> str:
    """Its process and the child's, where the test finds them."""
    child = subprocess.Popen(tied([sys.executable, "-c", "import time; time.sleep(600)"]))
    Path(subject).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return "never"


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
    Check("second: exits", exits),
    Check("second: fails", fails),
    Check("second: is missing", is_missing),
    Check("second: prints", prints),
)
ALONE = (Check("alone: falls silent", falls_silent), Check("alone: hangs with a child", hangs_with_a_child))

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
        if options.subject == "exits":
            sys.exit("no licence")
        return str(options.subject)

    answer(options.descriptor, options.checks, (*CHECKS, *ALONE), load)
