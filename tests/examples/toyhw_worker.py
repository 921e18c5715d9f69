"""Runs one after the other: `toyhw_worker.py jobs.json`. The ranks of a job are forks of one process, which imports
once and never loads a device.

A job is the values of a configuration, words that go before them, and the port where its ranks meet.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimizer imports it at its first step: once here instead of in every fork

from torchspec.core import settings
from torchspec.core.config.load import load_config
from torchspec.core.pipeline.inprocess import train

forked = runpy.run_path(str(Path(__file__).parents[1] / "forked.py"))


def rank_main(rank: int, job: dict[str, Any]) -> None:
    if job["ranks"] > 1:
        os.environ |= settings.rank_environment(
            rank=rank, world_size=job["ranks"], address="127.0.0.1", port=job["port"]
        )
    config, provenance = load_config(values=job["values"], overrides=job["words"])
    train(config, provenance=provenance)


def main() -> int:
    torch.set_num_threads(1)
    failed = 0
    for job in json.loads(Path(sys.argv[1]).read_text()):
        failed |= forked["run_ranks"](rank_main, [(rank, job) for rank in range(job["ranks"])])
    return failed


if __name__ == "__main__":
    sys.exit(main())
