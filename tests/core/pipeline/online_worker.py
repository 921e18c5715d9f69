"""Ranks that train one draft: `online_worker.py target results port`. Of a world of three the last two are the group.

Rank r of the group writes what it found to `<r>.json`, and the draft's weights at the end to `<r>.safetensors`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimizer imports it at its first step: once here instead of in every fork
from safetensors.torch import save_file
from torch import distributed as dist

from torchspec.core.errors import ConfigError, TorchspecError

forked = runpy.run_path(str(Path(__file__).parents[2] / "forked.py"))

spec = importlib.util.spec_from_file_location("online_case", Path(__file__).with_name("online_case.py"))
assert spec is not None
assert spec.loader is not None
case = importlib.util.module_from_spec(spec)
spec.loader.exec_module(case)

WORLD = 3
HELD = ((0, 2, 3, 5, 6, 7, 8), (1, 4))
"""Samples of each rank: windows of three are 0 1 2, 3 4 5 and 6 7 8, the last of which one rank has alone."""


def refused(work: Any) -> str:
    try:
        work()
    except TorchspecError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def trained(policy: Any, rank: int, group: Any, algorithm: str, results: Path, **more: Any) -> dict[str, Any]:
    trainer = case.make(policy, algorithm, group=group, **more)
    nothing = trainer.step()
    for number in HELD[rank]:
        trainer.add(**case.sample(policy, trainer, number))
    given = [case.sample(policy, trainer, number) for number in HELD[rank]]
    evaluated = trainer.evaluate(given)
    rows = [case.figures(trainer.step())]
    state, then = trainer.state_dict(), trainer.evaluate(given)
    rows += [case.figures(trainer.step()), case.figures(trainer.step())]
    weights = dict(trainer.draft_weights())
    export = trainer.export(results / f"{algorithm}-draft")
    again = case.make(policy, algorithm, group=group, **more)
    foreign = {**state, "identity": {**state["identity"], "rank": [9, 9]}}
    fresh = again.evaluate(given) == evaluated
    again.load_state_dict(state)
    fresh = fresh and again.evaluate(given) == then != evaluated
    resumed = [case.figures(again.step()), case.figures(again.step())]
    same = all(torch.equal(weights[name], tensor) for name, tensor in again.draft_weights())
    save_file(weights, results / f"{algorithm}-{rank}.safetensors")
    return {
        "nothing": nothing,
        "evaluated": evaluated,
        "rows": rows,
        "resumed": resumed == rows[1:] and same and fresh,
        "other_rank": refused(lambda: again.load_state_dict(foreign)),
        "counts": vars(trainer.counts),
        "left": trainer.step(partial=True),
        "distance": export.total_variation,
    }  # fmt: skip


def rank_main(rank: int, target: str, results: Path, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    group = dist.new_group([1, 2], timeout=timedelta(seconds=60))
    if rank:
        policy, mine = case.load_policy(target), rank - 1
        found: dict[str, Any] = {name: trained(policy, mine, group, name, results) for name in case.ALGORITHMS}
        more = {"precision": {"compute": "bfloat16"}, "train": {**case.TRAIN, "batch_size": 9}}
        rows = case.make(policy, group=group, **more)
        for number in HELD[mine]:
            rows.add(**case.sample(policy, rows, number))
        found["bfloat16"] = case.figures(rows.step())
        try:
            case.make(policy, group=group, seed=mine)
        except ConfigError as error:
            found["settings"] = str(error)
        asked = case.make(policy, group=group)
        given = case.sample(policy, asked, mine)
        found["refused"] = refused(lambda: asked.evaluate([given] if mine else [{**given, "last": None}]))
        found["works_on"] = asked.evaluate([given])["samples"]
        found["closed"] = refused(lambda: (asked.close(), asked.step()))
        late = case.make(policy, group=group, patience=1.0)
        start = time.monotonic()
        if mine == 0:
            found["late"], found["waited"] = refused(late.step), time.monotonic() - start
            store.set("refused", "")
        else:
            store.wait(["refused"], timedelta(seconds=120))
        (results / f"{mine}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # a group whose rank did not come is not taken down in order


def main() -> int:
    torch.set_num_threads(1)
    target, results, port = sys.argv[1:]
    failed: int = forked["run_ranks"](rank_main, [(rank, target, Path(results), int(port)) for rank in range(WORLD)])
    return failed


if __name__ == "__main__":
    sys.exit(main())
