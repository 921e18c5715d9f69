"""What is appended to a command of the documentation when a test runs it; CONTRIBUTING.md says so to readers.

Run as a program it is the `torchspec` of shell blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torchspec.cli import main

BATCHES = ("train.batch_size=4", "train.micro_batch_size=2")
STEPS = ("train.max_steps=2", *BATCHES, "eval.samples=2", "eval.max_new_tokens=8")
APPENDED = {
    "train": STEPS,
    "capture": BATCHES,
    "generate": ("--max-new-tokens", "8"),
    "eval": ("--samples", "2", "--max-new-tokens", "8"),
    "quickstart": (
        *("--answers", "0", "--samples", "2", "--max-new-tokens", "8", "--sweep", "1", "2", "--nproc", "1"),
        *STEPS,
    ),
}


def small(words: Sequence[str]) -> list[str]:
    """The command with as little to do as shows that it works; dry runs and help as they are typed."""
    if not words or {"--dry-run", "--help"} & set(words):
        return list(words)
    more = list(APPENDED.get(words[0], ()))
    if "--on-policy" in words:
        more.append("on_policy.max_new_tokens=8")
    if "--topology" in words and "--validation" not in words:  # each would be another process that loads everything
        more.append("data.validation=[]")
    return [*words, *more]


if __name__ == "__main__":
    sys.exit(main(small(sys.argv[1:])))
