"""The process in which `torchspec doctor --conformance-backend` runs the checks."""

from __future__ import annotations

import argparse
import atexit

from torchspec.backends.conformance import CHECKS, Setting, Subject
from torchspec.core.conformance.apart import answer


def load(setting: str) -> Subject:
    subject = Subject(Setting.from_json(setting))
    atexit.register(subject.close)
    return subject


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("setting")
    parser.add_argument("checks", nargs="*")
    options = parser.parse_args()
    answer(options.descriptor, options.checks, CHECKS, lambda: load(options.setting))
