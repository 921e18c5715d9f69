"""What sequence parallelism costs and saves: memory, bytes, balance; and one step of 131,072 tokens.

    python benchmarks/usp.py --json benchmarks/results/usp.json
    python benchmarks/usp.py --long 131072 --json benchmarks/results/usp_long.json

Every rank is a process of one thread over gloo and makes its own rows alone. Memory is the kernel's high-water mark
over the resident set before the rows are made. What a rank's peak grows by between two lengths is its
sequence-dependent part; with P ranks it should be 1/P of one rank's, and for `gather` the keys and values that it is
said to hold.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from harness import GIVE_BACK, _resident_peak, machine, write
from problem import TAPS, Inputs, Problem, make_draft, supervision
from torch import Tensor
from torch import distributed as dist

from torchspec.core import registry
from torchspec.core.attention.volume import Traffic, choose
from torchspec.core.features.rows import FeatureRows, TokenRows
from torchspec.core.interfaces.algorithm import StepMemory
from torchspec.core.parallel import mesh
from torchspec.core.parallel.sequence import Exchange
from torchspec.core.parallel.shards import Balance, Layout
from torchspec.core.pipeline.plan_parts import draft_parts, loss_parts, micro_batch_parts
from torchspec.core.pipeline.plan_terms import Load, Models
from torchspec.core.settings import Launch

SMALL = Problem(tokens=0, vocabulary=4096, draft_vocabulary=2048, unroll=3)
LONG = Problem(tokens=0, vocabulary=32000, draft_vocabulary=8000, heads=4, kv_heads=2, head_size=64, unroll=2)
SHAPES: tuple[tuple[int, int, Exchange], ...] = (
    (1, 1, "gather"),
    (2, 1, "gather"),
    (2, 1, "ulysses"),
    (1, 2, "ring"),
    (4, 1, "gather"),
    (4, 1, "ulysses"),
    (1, 4, "ring"),
    (2, 2, "usp"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way to share sequences of these lengths."""

    problem: Problem
    ulysses: int
    ring: int
    exchange: Exchange
    lengths: tuple[int, ...]
    recompute: bool = False

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring


class Counting:
    """A `Communication` that counts what this rank sends to others."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.sent = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def all_to_all(self, parts: Sequence[Tensor], group: Any, rows: Any = None) -> Any:
        self.sent += sum(part.nbytes for rank, part in enumerate(parts) if rank != group.rank())
        return self.inner.all_to_all(parts, group, rows)

    def all_gather(self, tensor: Tensor, group: Any) -> Any:
        self.sent += tensor.nbytes * (group.size() - 1)
        return self.inner.all_gather(tensor, group)

    def reduce_scatter(self, parts: Sequence[Tensor], group: Any) -> Any:
        self.sent += sum(part.nbytes for rank, part in enumerate(parts) if rank != group.rank())
        return self.inner.reduce_scatter(parts, group)

    def ring_exchange(self, tensor: Tensor, group: Any) -> Any:
        self.sent += tensor.nbytes * (group.size() > 1)
        return self.inner.ring_exchange(tensor, group)


def rank_main(job: Job, rank: int, port: int, answers: Queue[Any]) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.ranks, timeout=timedelta(hours=2))
    launch = Launch(rank=rank, local_rank=rank, world_size=job.ranks)
    context = mesh.start(registry.load_device("cpu"), launch, ulysses=job.ulysses, ring=job.ring)
    ends = Inputs.of(replace(job.problem, tokens=16))  # the target's ends; rows are made one by one
    algorithm, draft = make_draft(job.problem, ends)
    sequence = context.sequence_group(job.exchange)
    counting = Counting(context.device.communication)
    if sequence is not None:
        sequence = replace(sequence, communication=counting)  # type: ignore[arg-type]
    found = []
    for tokens in (min(512, *job.lengths), *job.lengths):  # the first is the warm-up
        dist.barrier()
        draft.zero_grad(set_to_none=True)
        base, counting.sent, started = _resident_peak(reset=True), 0, time.perf_counter()
        rows = make_rows(job, tokens, algorithm.halo, sequence)
        result = algorithm.step(draft, ends.head, rows, context.device, StepMemory(recompute=job.recompute))
        result.numerator.backward()
        walk = rows.layout.rows * (job.ranks - 1)
        found.append(
            {
                "tokens": tokens,
                "peak": _resident_peak() - base,
                "sent": max(0, counting.sent - walk),
                "seconds": time.perf_counter() - started,
            }
        )
        del rows, result
    answers.put((rank, found[1:]))
    dist.barrier()
    mesh.shutdown(context)
    dist.destroy_process_group()


def make_rows(job: Job, tokens: int, halo: int, sequence: Any) -> FeatureRows:
    """One document, all of it supervised; of its features this rank's share."""
    problem = job.problem
    layout = Layout(length=tokens) if sequence is None else sequence.layout(tokens)
    generator = torch.Generator().manual_seed(tokens)
    beyond = 0 if sequence is None else layout.pieces_per_rank * halo
    ids_T = torch.randint(0, problem.vocabulary, (tokens,), generator=generator)
    return FeatureRows(
        tokens=TokenRows.of([ids_T], [supervision(tokens, 1.0)]),
        layout=layout,
        taps_BSF=torch.randn(1, layout.rows, TAPS * problem.hidden),
        last_BXH=torch.randn(1, layout.rows + beyond, problem.hidden),
        norm_state="post_norm",
        sequence=sequence,
    )


def run(job: Job) -> list[dict[str, float]]:
    """Of each length, the largest peak and the bytes of any rank, and the seconds of the slowest."""
    context = get_context("spawn")
    answers: Queue[Any] = context.Queue()
    os.environ.update(GIVE_BACK)
    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    processes = [
        context.Process(target=rank_main, args=(job, rank, store.port, answers), daemon=True)
        for rank in range(job.ranks)
    ]
    for process in processes:
        process.start()
    found = []
    for _ in processes:
        while True:
            try:
                found.append(answers.get(timeout=5))
                break
            except Exception as waited:  # nothing came yet
                if any(process.exitcode for process in processes):
                    raise SystemExit("a rank died; its message is above") from waited
    for process in processes:
        process.join()
    by_length = zip(*(rows for _, rows in found), strict=True)
    return [{key: max(row[key] for row in rows) for key in rows[0]} for rows in by_length]


def traffic(job: Job, tokens: int) -> Traffic:
    algorithm, _ = make_draft(job.problem, Inputs.of(replace(job.problem, tokens=16)))
    layout = Layout(length=tokens, ulysses=job.ulysses, ring=job.ring)
    return Traffic(
        rows=layout.rows,
        queries=layout.rows,
        itemsize=4,
        shape=algorithm.attention_shape,
        ulysses=job.ulysses,
        ring=job.ring,
    )


def measure(lengths: tuple[int, int]) -> Iterator[dict[str, Any]]:
    alone: float | None = None
    for ulysses, ring, exchange in SHAPES:
        job = Job(problem=SMALL, ulysses=ulysses, ring=ring, exchange=exchange, lengths=lengths)
        low, high = run(job)
        part = high["peak"] - low["peak"]
        alone = part if alone is None else alone
        said = [traffic(job, tokens) for tokens in lengths]
        held = said[1].held(exchange) - said[0].held(exchange) if exchange == "gather" and job.ranks > 1 else 0
        yield {
            "ulysses": ulysses,
            "ring": ring,
            "exchange": exchange,
            "sequence_part_mb": part / 1e6,
            "stated_keys_mb": held / 1e6,
            "times_ranks_over_one": (part - held) * job.ranks / alone,
            "sent_mb": high["sent"] / 1e6,
            "formula_mb": said[1].sent(exchange) / 1e6 if job.ranks > 1 else 0.0,
            "seconds": high["seconds"],
        }


def balance(ranks: int, starts_T: Tensor, kind: Balance) -> dict[str, float]:
    """Share of the slowest rank's time in which the average rank works at attention, counted in (query, key) pairs.

    `starts_T` is the first position of each position's document. `gather`: every rank at its own queries; `ring`: in
    step, hop by hop.
    """
    layout = Layout(length=len(starts_T), ring=ranks, balance=kind)
    positions = [layout.positions(rank) for rank in range(ranks)]
    pairs = torch.zeros(ranks, ranks, dtype=torch.float64)  # of a rank's queries with a rank's keys
    for query in range(ranks):
        for key in range(ranks):
            upto = torch.searchsorted(positions[key], positions[query], right=True)
            hidden = torch.searchsorted(positions[key], starts_T[positions[query]])
            pairs[query, key] = (upto - hidden).sum()
    hops = torch.stack([pairs[range(ranks), [(r - hop) % ranks for r in range(ranks)]] for hop in range(ranks)])
    total = float(pairs.sum())
    return {
        "gather": total / ranks / float(pairs.sum(1).max()),
        "ring": total / ranks / float(hops.max(1).values.sum()),
    }


def starts(tokens: int, documents: Tensor | None) -> Tensor:
    """Of one document, or of documents of these lengths over and over."""
    place_T = torch.arange(tokens)
    if documents is None:
        return torch.zeros_like(place_T)
    ends = documents.repeat(tokens // int(documents.sum()) + 1).cumsum(0)
    return torch.cat((torch.zeros(1, dtype=torch.int64), ends))[torch.searchsorted(ends, place_T, right=True)]


def balances() -> dict[str, dict[str, dict[str, float]]]:
    """Of 32,768 positions: one document, and documents of 64 to 8,192 tokens in one row."""
    lengths = (64 * 2 ** (7 * torch.rand(32, generator=torch.Generator().manual_seed(0)))).long()
    cases: dict[str, tuple[Balance, Tensor]] = {
        "contiguous": ("contiguous", starts(1 << 15, None)),
        "zigzag": ("zigzag", starts(1 << 15, None)),
        "zigzag, packed": ("zigzag", starts(1 << 15, lengths)),
    }
    return {
        name: {str(ranks): balance(ranks, starts_T, kind) for ranks in (2, 4, 8, 16)}
        for name, (kind, starts_T) in cases.items()
    }


def long_step(tokens: int, ranks: int) -> dict[str, Any]:
    problem = replace(LONG, tokens=tokens)
    algorithm, draft = make_draft(problem, Inputs.of(replace(problem, tokens=16)))
    job = Job(problem=LONG, ulysses=1, ring=ranks, exchange="gather", lengths=(tokens,), recompute=True)
    said = traffic(job, tokens)
    activations = int(said.rows * algorithm.kept_values(recompute=True) * 4)
    exchange, why = choose(said, activations)
    job = replace(job, exchange=exchange)
    (found,) = run(job)
    planned = plan(algorithm, draft, said, exchange)
    return {
        "settings": vars(problem) | {"ranks": ranks, "exchange": exchange, "recompute": True},
        "why": why,
        "seconds": found["seconds"],
        "peak_mb_over_base": found["peak"] / 1e6,
        "planned_mb": planned / 1e6,
        "measured_over_planned": found["peak"] / planned,
        "sent_mb": found["sent"] / 1e6,
        "formula_mb": said.sent(exchange) / 1e6,
    }


OUTSIDE = (
    "draft parameters",
    "optimizer state",
    "gathered parameters",
    "gathering",
    "target model",
    "target embedding and head",
)
"""Parts of a run that are there before the step, or that this benchmark, which shards no parameters, does not have."""


def plan(algorithm: Any, draft: torch.nn.Module, said: Traffic, exchange: Exchange) -> int:
    """What the planner of --dry-run says of the step: the dearer of its forward and its backward pass."""
    models = Models(
        algorithm=algorithm,
        spec=algorithm.target,
        draft=tuple(tuple(parameter.shape) for parameter in draft.parameters()),
        target=(),
        mapped=False,
        process=None,
    )
    load = Load(
        text=said.rows * said.ulysses * said.ring,
        ranks=1,
        rows=said.rows,
        captured=0,
        several=False,
        compute=torch.float32,
        target_dtype=torch.float32,
        memory=StepMemory(recompute=True, loss_bytes=registry.load_device("cpu").ops.loss_bytes),
        exchange=exchange,
        held=said.held(exchange),
    )
    parts = [part for make in (draft_parts, micro_batch_parts, loss_parts) for part in make(models, load)]
    counted = [part for part in parts if part.name not in OUTSIDE]
    for part in counted:
        print(f"  {part.name:32s} {part.bytes / 1e6:8.0f} MB  {', '.join(part.moments)}")
    return max(sum(part.bytes for part in counted if moment in part.moments) for moment in ("loss", "backward"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs=2, default=(2048, 8192), help="between which memory grows")
    parser.add_argument("--long", type=int, help="one step of so many tokens, activations made again")
    parser.add_argument("--ranks", type=int, default=2, help="that share the long sequence")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    body: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/usp.py", *sys.argv[1:]]), "machine": machine()}
    if args.long:
        body |= long_step(args.long, args.ranks)
        for name in ("seconds", "peak_mb_over_base", "planned_mb", "measured_over_planned", "sent_mb", "formula_mb"):
            print(f"{name:24s} {body[name]:12.2f}")
    else:
        body["settings"] = vars(SMALL) | {"lengths": list(args.lengths)}
        body["shapes"] = []
        print(f"{'':14s} {'MB of rows':>10s} {'x P / one':>10s} {'sent MB':>9s} {'formula':>9s} {'seconds':>8s}")
        for row in measure(tuple(args.lengths)):
            name = f"{row['ulysses']}x{row['ring']} {row['exchange']}"
            print(
                f"{name:14s} {row['sequence_part_mb']:10.0f} {row['times_ranks_over_one']:10.3f} {row['sent_mb']:9.1f} "
                f"{row['formula_mb']:9.1f} {row['seconds']:8.1f}",
                flush=True,
            )
            body["shapes"].append(row)
        body["balance"] = balances()
        for name, found in body["balance"].items():
            print(name, {ranks: {how: round(share, 3) for how, share in row.items()} for ranks, row in found.items()})
    write(args.json, body)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
