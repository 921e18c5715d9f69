"""A loop of reinforcement learning over one rank and over two: `online_policy_worker.py target results port`.

The ranks hold the same policy but for the head, of which each has a part of the vocabulary; the draft is theirs
together, each bringing every other text. Rank r of `size` writes `<size>-<r>.json`, a row for each step.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimizer imports it at its first step: once here instead of in every fork
from torch import distributed as dist

from torchspec.core import registry
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.objectives import hidden_log_probabilities

forked = runpy.run_path(str(Path(__file__).parents[2] / "forked.py"))

spec = importlib.util.spec_from_file_location("online_case", Path(__file__).with_name("online_case.py"))
assert spec is not None
assert spec.loader is not None
case = importlib.util.module_from_spec(spec)
spec.loader.exec_module(case)

TEXTS, LENGTH, STEPS = 4, 12, 3


def learn(rank: int, size: int, target: str) -> list[dict[str, Any]]:
    device, group = registry.load_device("cpu"), dist.group.WORLD
    policy = case.load_policy(target)
    whole_VH = policy.lm_head.weight
    shards = VocabularyShards(group=group, communication=device.communication, target_size=len(whole_VH))
    start, stop = shards.bounds(rank)
    part = whole_VH.detach()[start:stop].clone().requires_grad_()
    body = [parameter for parameter in policy.model.parameters() if parameter is not whole_VH]
    optimizer = torch.optim.SGD([*body, part], lr=0.05)
    draft = case.make(policy, group=group, train={**case.TRAIN, "batch_size": TEXTS})
    rows = []
    for step in range(STEPS):
        ids_BT = torch.randint(3, 300, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(step))
        out = policy.model(ids_BT, output_hidden_states=True, use_cache=False)
        tokens_N = torch.where(torch.arange(LENGTH - 1) < 3, -100, ids_BT[:, 1:]).flatten()
        found = hidden_log_probabilities(
            out.last_hidden_state[:, :-1].flatten(0, 1), part, tokens_N, device.ops, shards=shards, entropy=True
        )
        assert found.entropy_N is not None
        loss = -found.log_probability_N.mean() - 0.01 * found.entropy_N.mean()
        places = dict(zip(draft.required.tap_layers, draft.required.hf_hidden_states, strict=True))
        for number in range(rank, TEXTS, size):
            draft.add(
                ids_BT[number], torch.arange(LENGTH) > 3,
                {layer: out.hidden_states[place][number] for layer, place in places.items()},
                out.last_hidden_state[number], norm_state="post_norm", name=f"{step}-{number}",
            )  # fmt: skip
        row = draft.step()
        optimizer.zero_grad()
        loss.backward()
        squares = sum(float(p.grad.square().sum()) for p in body if p.grad is not None)
        squares += float(device.communication.all_reduce(part.grad.square().sum()[None], group))
        optimizer.step()
        parts = device.communication.all_gather(_padded(part.detach(), -(-len(whole_VH) // size)), group)
        whole_VH.data = torch.cat([each[: _rows(shards, r)] for r, each in enumerate(parts)])
        draft.update_target(policy)
        rows.append({
            "loss": loss.item(), "log_probabilities": found.log_probability_N.tolist(), "norm": squares**0.5,
            "draft": row["loss"], "stale": row["stale_samples"],
        })  # fmt: skip
    draft.close()
    return rows


def _rows(shards: VocabularyShards, rank: int) -> int:
    start, stop = shards.bounds(rank)
    return stop - start


def _padded(part: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(part, (0, 0, 0, rows - len(part)))


def rank_main(rank: int, size: int, target: str, results: Path, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    store = dist.PrefixStore(str(size), store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    (results / f"{size}-{rank}.json").write_text(json.dumps(learn(rank, size, target)))
    dist.destroy_process_group()


def main() -> int:
    torch.set_num_threads(1)
    target, results, port = sys.argv[1:]
    jobs = [(rank, size, target, Path(results), int(port)) for size in (1, 2) for rank in range(size)]
    failed: int = forked["run_ranks"](rank_main, jobs)
    return failed


if __name__ == "__main__":
    sys.exit(main())
