"""Random training windows whose sequences, target or head ranks share, against one rank that owns everything.

python benchmarks/usp_stress.py --json benchmarks/results/usp_stress.json

Every case is drawn from (seed, number) alone, so that one can be run again by itself (--only). Its loss, metrics and
gradients in fp64 must be those of one process, which knows neither packing nor recomputation nor a divided head, and
it must end in time: gloo gives up a message after `DEADLINE`; before, the parent says which case stands still, which
ranks the others wait for, and where in the code each of them is.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import multiprocessing
import os
import random
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP imports it: once here instead of in every fork
from harness import machine, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from torchspec.core import registry
from torchspec.core.algorithms.eagle3.algorithm import Eagle3
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.attention.volume import possible
from torchspec.core.features.memory import MemoryStore
from torchspec.core.interfaces.algorithm import StepMemory, TrainingSample
from torchspec.core.interfaces.engine import CaptureRequest, TargetSpec
from torchspec.core.interfaces.features import Captured, Features
from torchspec.core.interfaces.target import VocabularyMap, VocabularyShards
from torchspec.core.models.target_head import SafetensorsTargetHead
from torchspec.core.parallel import mesh
from torchspec.core.parallel.sequence import Exchange
from torchspec.core.settings import Launch
from torchspec.core.training.capturing import Model
from torchspec.core.training.sharding import shard_draft
from torchspec.core.training.timing import StepTimer
from torchspec.core.training.window import Cut, run_window

H, V, HEADS, HEAD_SIZE, DRAFT_V = 32, 90, 8, 8, 60
LONGEST, MOST_DOCUMENTS = 80, 10
LIMIT = 1e-11
CANCELLED = 1e-4
"""A gradient smaller than this share of all of them may be what rounding left of larger ones: it is held against it."""

DEADLINE = timedelta(seconds=60)
TOGETHER = 20
"""Cases of the same processes: threads of gloo outlive their groups, and hundreds that poll fill a machine."""

PATIENCE = 50.0
"""Seconds for a case; less than the deadline, so that the ranks still stand where they got stuck."""

SUPERVISION = ("dense", "sparse", "none", "token", "one document")
OBJECTIVES = ({"cross_entropy": 1.0}, {"cross_entropy": 0.5, "tv": 0.7, "reverse_kl": 0.3}, {"tv": 1.0, "jsd": 0.5})
STAGES = ("starting", "making the model", "in the window", "comparing", "done")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What fixes the numbers."""

    number: int
    lengths: list[int]
    supervision: str
    kv_heads: int
    unroll: int
    objective: dict[str, float]
    coverage: str
    normalisation: str

    @property
    def algorithm(self) -> Eagle3:
        names = ("unroll", "objective", "coverage", "normalisation")
        options = {name: getattr(self, name) for name in names} | {"vocab_size": DRAFT_V}
        spec = TargetSpec(
            path=Path("benchmark"),
            architecture="LlamaForCausalLM",
            model_type="llama",
            num_layers=8,
            hidden_size=H,
            intermediate_size=48,
            num_attention_heads=HEADS,
            num_key_value_heads=self.kv_heads,
            head_dim=HEAD_SIZE,
            vocab_size=V,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            dtype=torch.float64,
            tie_word_embeddings=False,
            eos_token_ids=(0,),
        )
        return Eagle3.create(Eagle3Options.model_validate(options), spec)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem and how its numbers come about; the defaults are the plainest way, that of one rank.

    together    ranks that hold the target together; 1: none do
    head        the target's head: "whole", or shared by "tokens" or by "vocabulary"
    """

    problem: Problem
    ulysses: int = 1
    ring: int = 1
    exchange: Exchange = "gather"
    together: int = 1
    head: str = "whole"
    micro_batch_size: int = MOST_DOCUMENTS
    row_tokens: int | None = None
    recompute: bool = False
    loss_bytes: int | None = None

    @property
    def number(self) -> int:
        return self.problem.number

    def __str__(self) -> str:
        problem = self.problem
        rows = f"rows of {self.row_tokens} tokens" if self.row_tokens else f"{self.micro_batch_size} rows"
        how = f"{self.ulysses}x{self.ring} {self.exchange}, {rows}, head {self.head}"
        how += f", target over {self.together}" * (self.together > 1) + ", recomputed" * self.recompute
        what = f"{len(problem.lengths)} documents, {problem.supervision}, {problem.kv_heads} key heads"
        return f"{how}; {what}, {problem.unroll} steps"


def draw(seed: int, number: int, ranks: int) -> Case:
    """A function of its arguments alone."""
    dice = random.Random(f"{seed}/{number}")
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    ulysses, ring = dice.choice([(u, p // u) for p in divisors for u in divisors if p % u == 0])
    longest = dice.choice([3, 20, LONGEST])
    problem = Problem(
        number=number,
        lengths=[dice.randint(1, longest) for _ in range(dice.randint(1, MOST_DOCUMENTS))],
        supervision=dice.choice(SUPERVISION),
        kv_heads=dice.choice([1, 2, 4, 8]),
        unroll=dice.randint(1, 4),
        objective=dice.choice(OBJECTIVES),
        coverage=dice.choice(["drop", "renormalise", "weight"]),
        normalisation=dice.choice(["token", "per_sequence"]),
    )
    together = dice.choice([1, 1, 1, *(d for d in divisors if d > 1 and d % (ulysses * ring) == 0)])
    packed = dice.random() < 0.5
    longest, whole = max(problem.lengths), sum(problem.lengths)
    return Case(
        problem=problem,
        ulysses=ulysses,
        ring=ring,
        exchange=dice.choice(possible(problem.algorithm.attention_shape, ulysses, ring)),
        together=together,
        head=dice.choice(["whole", "tokens", "vocabulary"]) if ranks > 1 else "whole",
        micro_batch_size=dice.randint(1, 4),
        row_tokens=dice.randint(longest, max(longest, whole)) if packed else None,
        recompute=dice.random() < 0.5,
        loss_bytes=dice.choice([None, 1 << 14]),
    )


@dataclass(frozen=True)
class Documents:
    """The problem's documents: tokens by number, supervision as it says."""

    problem: Problem

    @property
    def lengths(self) -> Sequence[int]:
        return self.problem.lengths

    def __len__(self) -> int:
        return len(self.problem.lengths)

    def __getitem__(self, index: int) -> TrainingSample:
        generator = torch.Generator().manual_seed(1000 * self.problem.number + index)
        length, chosen = self.lengths[index], self.problem.number % len(self)
        place_T = torch.arange(length)
        mask_T = {
            "dense": torch.ones(length, dtype=torch.bool),
            "sparse": (place_T % 9 > 5) & (place_T < 30),
            "none": torch.zeros(length, dtype=torch.bool),
            "token": (place_T == length * 2 // 3) & (index == chosen),
            "one document": (place_T >= 0) & (index == chosen),
        }[self.problem.supervision]
        ids_T = torch.randint(0, V, (length,), generator=generator)
        return TrainingSample(sample_id=f"{self.problem.number}-{index}", input_ids_T=ids_T, loss_mask_T=mask_T)


class MadeUpTarget:
    """Features that depend on the document's tokens alone."""

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: MemoryStore) -> list[Captured]:
        references = []
        for request in batch:
            ids_T = torch.tensor(request.input_ids)
            generator = torch.Generator().manual_seed(int((ids_T * torch.arange(1, len(ids_T) + 1)).sum()))
            features = Features(
                input_ids_T=ids_T,
                taps_TNH=torch.randn(len(ids_T), len(taps), H, generator=generator, dtype=torch.float64),
                last_TH=torch.randn(len(ids_T), H, generator=generator, dtype=torch.float64),
                tap_layers=tuple(taps),
                norm_state="post_norm",
            )
            references.append(sink.put(request.record_id, features))
        return references


class SharedHead:
    """A `TargetHead` of which the step may read this rank's rows alone."""

    def __init__(self, whole: SafetensorsTargetHead, shards: VocabularyShards) -> None:
        start, stop = shards.bounds(shards.rank)
        self.shards, self.shard_VH = shards, whole.head_VH[start:stop].clone()
        self.rows, self.normed, self.finished = whole.rows, whole.normed, whole.finished
        self.embedding_VH = whole.embedding_VH


def make_model(case: Case, context: mesh.ParallelContext) -> Model:
    torch.manual_seed(case.number)
    ends = torch.randn(2, V, H, dtype=torch.float64)
    head: Any = SafetensorsTargetHead(embedding_VH=ends[0], head_VH=0.3 * ends[1], final_norm=nn.Identity())
    if case.head != "whole":
        shards = VocabularyShards(group=context.logits_group, communication=context.device.communication, target_size=V)
        head = SharedHead(head, shards)
    algorithm = case.problem.algorithm
    ids_N = torch.arange(V)[torch.arange(V) % 3 != 1]
    draft = algorithm.build_draft(VocabularyMap(ids_N=ids_N, target_size=V), head)
    return Model(
        algorithm=algorithm,
        draft=shard_draft(draft.double(), context, "float32"),
        head=head,
        engine=MadeUpTarget(),  # type: ignore[arg-type]
        memory=StepMemory(
            recompute=case.recompute,
            loss_bytes=case.loss_bytes,
            shard_logits="vocabulary" if case.head == "vocabulary" else "tokens",
        ),
        exchange=case.exchange,
    )


def window(case: Case, model: Model, context: mesh.ParallelContext) -> dict[str, Tensor]:
    """Sums and whole gradients of one optimizer window over all documents, on every rank."""
    documents = Documents(case.problem)
    cut = Cut(micro_batch_size=case.micro_batch_size, row_tokens=case.row_tokens, equal_length=50.0)
    result = run_window(model, documents, range(len(documents)), cut, context, StepTimer(context.torch_device))
    found = {f"sum.{name}": value for name, value in result.sums.values.items()}
    found["sum.tokens"] = torch.tensor(result.sums.tokens)
    for name, parameter in model.draft.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        found[f"grad.{name}"] = parameter.grad.full_tensor()
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def apart(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The worst relative 2-norm difference of a tensor, and its name; infinite for NaN, and where zeros are missed."""
    if got.keys() != expected.keys():
        return float("inf"), f"tensors {sorted(got.keys() ^ expected.keys())}"
    size = {name: float(value.double().norm()) for name, value in expected.items()}
    every = sum(value**2 for name, value in size.items() if name.startswith("grad.")) ** 0.5
    worst = (0.0, "")
    for name, value in expected.items():
        difference = float((got[name].double() - value.double()).norm())
        scale = max(size[name], CANCELLED * every if name.startswith("grad.") else 0.0)
        if math.isnan(difference) or (difference and not scale):
            return float("inf"), name
        relative = difference / scale if scale else 0.0
        worst = max(worst, (relative, name))
    return worst


Work = Callable[[Case, mesh.ParallelContext, Callable[[str], None]], None]
"""What a rank does with a case; it says which of the `STAGES` it has come to."""


def by_ranks(count: int, cases: Sequence[Case], work: Work) -> str:
    """What went wrong; empty if every rank did every case."""
    turns = (Ranks(count, cases[first : first + TOGETHER], work).run() for first in range(0, len(cases), TOGETHER))
    return next((problem for problem in turns if problem), "")


class Ranks:
    """Forks of this process, one thread each, whose progress it watches."""

    def __init__(self, count: int, cases: Sequence[Case], work: Work) -> None:
        fork = multiprocessing.get_context("fork")
        self.cases, self.work, self.count = cases, work, count
        self.place = fork.RawArray("i", count)  # which of the cases a rank is at
        self.stage = fork.RawArray("i", count)
        self.since = fork.RawArray("d", count)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=DEADLINE)  # type: ignore[attr-defined]
        self.processes: list[BaseProcess] = [
            fork.Process(target=self._serve, args=(rank,), daemon=True) for rank in range(count)
        ]

    def run(self) -> str:
        """What went wrong; empty if every rank did every case."""
        for process in self.processes:
            process.start()
        try:
            while any(process.is_alive() for process in self.processes):
                time.sleep(0.2)
                dead = [rank for rank, process in enumerate(self.processes) if process.exitcode]
                if dead:
                    time.sleep(2.0)  # for what others have to say of it
                    return f"rank {dead[0]} failed in {self._at(dead[0])}"
                late = [rank for rank in range(self.count) if self._late(rank)]
                if late:
                    return self._stuck()
        finally:
            for process in self.processes:
                if process.is_alive():
                    process.kill()
        return ""

    def report(self, rank: int, stage: str) -> None:
        self.stage[rank] = STAGES.index(stage)

    def _late(self, rank: int) -> bool:
        working = self.stage[rank] not in (0, STAGES.index("done"))
        return working and time.monotonic() - self.since[rank] > PATIENCE

    def _stuck(self) -> str:
        """The ranks furthest behind are those that others wait for; the stacks say where all of them are."""
        progress = [(self.place[rank], self.stage[rank]) for rank in range(self.count)]
        behind = [rank for rank in range(self.count) if progress[rank] == min(progress)]
        for rank, process in enumerate(self.processes):
            print(f"rank {rank} is {STAGES[self.stage[rank]]} of {self._at(rank)}:", file=sys.stderr, flush=True)
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(0.3)
        waited = "all of them" if len(behind) == self.count else f"rank(s) {behind}"
        return f"{self._at(behind[0])} did not end in {PATIENCE:.0f} s; furthest behind: {waited}"

    def _at(self, rank: int) -> str:
        return f"case {self.cases[self.place[rank]].number}"

    def _serve(self, rank: int) -> None:
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", self.store.port, is_master=False, timeout=DEADLINE)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=self.count, timeout=DEADLINE)
        launch = Launch(rank=rank, local_rank=rank, world_size=self.count)
        for place, case in enumerate(self.cases):
            self.place[rank], self.since[rank] = place, time.monotonic()
            self.report(rank, "making the model")
            # A mesh for each: every group has threads of its own, which would fill the machine.
            sizes = {"ulysses": case.ulysses, "ring": case.ring, "tensor": case.together}
            context = mesh.start(registry.load_device("cpu"), launch, DEADLINE, **sizes)
            self.work(case, context, partial(self.report, rank))
            mesh.shutdown(context)
        self.report(rank, "done")
        dist.destroy_process_group()


def references(cases: Sequence[Case], directory: Path) -> str:
    """Each case's result on one rank, into the directory."""

    def work(case: Case, context: mesh.ParallelContext, report: Callable[[str], None]) -> None:
        found = window(case, make_model(case, context), context)
        save_file(found, directory / f"{case.number}.safetensors")

    return by_ranks(1, [Case(problem=case.problem) for case in cases], work)


def compared(cases: Sequence[Case], args: argparse.Namespace, directory: Path) -> str:
    """Each case on all ranks; rank 0 writes a line of outcomes.jsonl for each."""
    again = f"python benchmarks/usp_stress.py --ranks {args.ranks} --seed {args.seed} --only"
    lines = directory / "outcomes.jsonl"

    def work(case: Case, context: mesh.ParallelContext, report: Callable[[str], None]) -> None:
        begun = time.monotonic()
        model = make_model(case, context)
        report("in the window")
        got = window(case, model, context)
        report("comparing")
        if not context.is_main:
            return
        difference, name = apart(got, load_file(directory / f"{case.number}.safetensors"))
        seconds = time.monotonic() - begun
        bad = not difference <= LIMIT
        line = {"number": case.number, "seconds": seconds, "difference": difference, "tensor": name, "bad": bad}
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{case.number:4d}  {seconds:5.2f} s  {difference:8.1e}  {case}", flush=True)
        if bad:
            print(f"      DIFFERS in {name}. Alone: {again} {case.number}", flush=True)

    problem = by_ranks(args.ranks, cases, work)
    return f"{problem}. Alone: {again} {problem.split('case ')[1].split()[0]}" if problem else ""


def summary(cases: Sequence[Case], outcomes: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    worst = max(outcomes, key=lambda line: line["difference"], default=None)
    return {
        "command": shlex.join(["python", "benchmarks/usp_stress.py", *sys.argv[1:]]),
        "machine": machine(),
        "ranks": args.ranks,
        "seed": args.seed,
        "configurations": len(cases),
        "equal": sum(not line["bad"] for line in outcomes),
        "failed": [line["number"] for line in outcomes if line["bad"]],
        "limit": LIMIT,
        "worst_relative_difference": worst["difference"] if worst else None,
        "worst": {"case": worst["number"], "tensor": worst["tensor"]} if worst else None,
        "slowest_seconds": max((line["seconds"] for line in outcomes), default=None),
        "shapes": dict(sorted(Counter(f"{case.ulysses}x{case.ring}" for case in cases).items())),
        "exchanges": dict(Counter(case.exchange for case in cases if case.ulysses * case.ring > 1)),
        "heads": dict(Counter(case.head for case in cases)),
        "supervision": dict(Counter(case.problem.supervision for case in cases)),
        "packed": sum(case.row_tokens is not None for case in cases),
        "recomputed": sum(case.recompute for case in cases),
        "target_held_together": sum(case.together > 1 for case in cases),
        "fewer_documents_than_data_ranks": sum(
            len(case.problem.lengths) * case.ulysses * case.ring < args.ranks for case in cases
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--count", type=int, default=200, help="cases 0 to COUNT - 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--json", type=Path, help="write the summary here")
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every shape of ranks has connections of its own
    numbers = range(args.count) if args.only is None else [args.only]
    cases = [draw(args.seed, number, args.ranks) for number in numbers]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        problem = references(cases, directory)
        problem = f"on one rank: {problem}" if problem else compared(cases, args, directory)
        lines = directory / "outcomes.jsonl"
        outcomes = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    body = summary(cases, outcomes, args) | {"seconds": time.monotonic() - begun, "problem": problem}
    write(args.json, body)
    print(f"{body['equal']} of {len(cases)} equal, worst {body['worst_relative_difference']}, {body['seconds']:.0f} s")
    if problem:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problem or body["equal"] != len(cases) else 0


if __name__ == "__main__":
    raise SystemExit(main())
