"""The process in which `torchspec doctor --conformance` runs the checks: `--descriptor N NAME -- CHECK...`."""

from __future__ import annotations

import argparse

from torchspec.core.conformance.apart import answer
from torchspec.devices.conformance import CHECKS, subject_of

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--descriptor", type=int, required=True)
    parser.add_argument("name")
    parser.add_argument("checks", nargs="*")
    options = parser.parse_args()
    answer(options.descriptor, options.checks, CHECKS, lambda: subject_of(options.name))
