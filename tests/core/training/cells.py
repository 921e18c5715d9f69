"""The tiny runs of test_parallel_gradients.py and test_resume.py, so that one process per rank serves them all."""

from __future__ import annotations

import random
from typing import Any

Cell = dict[str, Any]

# What the loss is depends on the window before and on how far the run has come.
OBJECTIVE = {"lk_lambda": 1.0, "kl": 0.2, "tv": {"start": 0.0, "end": 0.3, "until": 0.5}}

WINDOW = {"kind": "gradients", "config": {"batch_size": 7, "micro_batch_size": 2}}
GRADIENTS: list[Cell] = [
    {**WINDOW, "name": "float64", "dtype": "float64"},
    {**WINDOW, "name": "float32", "dtype": "float32"},
    # With 3 ranks and micro-batches of 1 a batch of 7 leaves holes; half of the samples teach nothing.
    {**WINDOW, "name": "holes", "dtype": "float64", "config": {"batch_size": 7, "micro_batch_size": 1}, "count": 21,
     "unsupervised": list(range(0, 21, 2))},
    {**WINDOW, "name": "whole", "dtype": "float64", "config": {"batch_size": 7, "micro_batch_size": 7}},
    {**WINDOW, "name": "nothing", "dtype": "float64", "unsupervised": list(range(13))},
    {**WINDOW, "name": "bfloat16", "compute": "bfloat16"},
    *({**WINDOW, "name": f"lk_lambda-{size}", "dtype": "float64", "objective": OBJECTIVE,
       "config": {"batch_size": 7, "micro_batch_size": size}, "count": 21, "unsupervised": list(range(0, 21, 2))}
      for size in (1, 4, 7)),
]  # fmt: skip

# Dropout draws from each rank's own random state; 5 epochs of 4 steps, and the last batch of each is short.
STEPS, EVERY = 20, 3
CONFIG = {"epochs": 5, "batch_size": 4, "micro_batch_size": 1, "checkpoint_every": EVERY, "keep_last": 2}
RUN: Cell = {"kind": "train", "config": CONFIG, "dropout": 0.3, "objective": OBJECTIVE}
KILLS = (1, 7, 15)  # before the first checkpoint, between two, where one is due
# Where a SIGKILL falls: some Python calls after the start, or after a step; a step takes about 17,000, a checkpoint
# 35,000. So it may fall in a step, in a checkpoint, or while a run is being resumed.
MOMENTS: list[Cell] = [
    {"kill_after": 100_000},
    *({"kill_from": step, "kill_after": random.Random(step).randrange(60_000)} for step in (4, 9, 12, 16)),
]
# The best is at 12; the last is validated too. Steps 8 and 16 are checkpoints for their validation's sake alone.
VALIDATED: Cell = {
    **RUN,
    "validate_every": 4,
    "scores": {"4": 1.5, "8": 1.2, "12": 1.9, "16": 1.9, "20": 1.3},
}


def resume_cells(ranks: int) -> list[Cell]:
    last = ranks - 1
    made = [{**RUN, "name": "reference"}]
    for step in KILLS:
        made += [
            {**RUN, "name": f"kill-{step}-a", "directory": f"kill-{step}", "kill": [step, "KILL", last]},
            {**RUN, "name": f"kill-{step}-b", "directory": f"kill-{step}"},
        ]
    for name in ("TERM", "INT"):
        made += [
            {**RUN, "name": f"{name}-a", "directory": name, "kill": [8, name, last]},
            {**RUN, "name": f"{name}-b", "directory": name},
        ]
    made += [{**RUN, "name": f"moment-{n}", "directory": "moment", **when} for n, when in enumerate(MOMENTS)]
    made += [{**RUN, "name": "moment-end", "directory": "moment"}, {**VALIDATED, "name": "validated"}]
    killed = {**VALIDATED, "directory": "validated-killed"}
    made += [{**killed, "name": f"validating-{step}", "kill_validating": [step, last]} for step in (4, 8, 12)]
    # Between the checkpoint before the validation of step 16 and the row after it, or thereabouts.
    made += [{**killed, "name": "validating-late", "kill_from": 16, "kill_after": 33_000}]
    return [*made, {**killed, "name": "validating-end"}]


# Half a run on 3 ranks and the rest on 1, without randomness.
RESHARD: Cell = {**RUN, "dropout": 0.0, "dtype": "float64", "directory": "../reshard"}
# Rank 1 of 2 cannot write its part of the checkpoint of step 6.
FULL: list[Cell] = [
    {**RUN, "name": "full-a", "directory": "full", "file_limit": [5, 1000, 1]},
    {**RUN, "name": "full-b", "directory": "full"},
]
AGREEMENT: Cell = {"name": "agreement", "kind": "agreement"}
PATIENCE: Cell = {"name": "patience", "kind": "patience"}

FAILED_VALIDATION: Cell = {
    **RUN,
    "kind": "failed validation",
    "name": "failed-validation",
    "validate_every": 4,
}

CELLS: dict[int, list[Cell]] = {
    3: [*GRADIENTS, AGREEMENT, PATIENCE, {**RESHARD, "name": "reshard-a", "kill": [10, "TERM", 0]}],
    2: [*GRADIENTS, *resume_cells(2), *FULL, FAILED_VALIDATION],
    1: [
        *GRADIENTS,
        *resume_cells(1),
        {**RESHARD, "name": "reshard-b"},
        {**RESHARD, "name": "whole", "directory": "alone"},
    ],
}
