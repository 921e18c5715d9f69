"""Checks that train a small draft through the command line: the numbers must be the CPU's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from torchspec.core.conformance.apart import tied
from torchspec.core.conformance.checks import Check
from torchspec.devices.conformance.ranks import needs_ranks, run_ranks
from torchspec.devices.conformance.subject import Subject

SECONDS = 280
STEPS = 4
TOLERANCE = 2e-4
"""Of losses and gradient norms in fp32: four steps of an optimizer multiply what rounding begins."""

HALF_TOLERANCE = 3e-2

_WORDS = (
    "--target", "embedded", "precision.compute=float32", "target.dtype=float32", "train.batch_size=4",
    "train.micro_batch_size=2", f"train.max_steps={STEPS}", "data.max_length=96", "draft.vocab_size=500",
    "draft.unroll=3", "seed=3",
)  # fmt: skip


def _conversations() -> str:
    made = [
        {"messages": [
            {"role": "user", "content": f"What is {n} plus {n + 3}?"},
            {"role": "assistant", "content": f"{n} plus {n + 3} is {2 * n + 3}. " * (2 + n % 5)},
        ]}
        for n in range(4 * STEPS)
    ]  # fmt: skip
    return "".join(json.dumps(each) + "\n" for each in made)


def _train(device: str, folder: Path, *words: str, ranks: bool = False) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    data, output = folder / "data.jsonl", folder / "run"
    data.write_text(_conversations())
    command = ["torchspec", "train", "--device", device, "--data", str(data), "--output", str(output), *_WORDS, *words]
    if ranks:
        run_ranks(command, SECONDS)
    else:
        whole = tied([sys.executable, "-P", "-m", *command])
        done = subprocess.run(whole, capture_output=True, text=True, timeout=SECONDS, check=False)
        said = " | ".join(line.strip() for line in done.stderr.splitlines()[-3:])
        assert done.returncode == 0, f"`torchspec train --device {device}` ended with code {done.returncode}: {said}"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"]


@cache
def _reference(*words: str) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        return _train("cpu", Path(folder), *words)


def _same(subject: Subject, *words: str, ranks: bool = False) -> str:
    wanted = _reference()
    with tempfile.TemporaryDirectory() as folder:
        got = _train(subject.spec.name, Path(folder), *words, ranks=ranks)
    assert len(got) == len(wanted) == STEPS, f"{len(got)} steps, not {STEPS}"
    pairs = [(a, b) for mine, theirs in zip(got, wanted, strict=True) for a, b in zip(mine, theirs, strict=True)]
    worst = max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)
    losses = [", ".join(f"{loss:.5g}" for loss, _ in run) for run in (got, wanted)]
    assert worst <= TOLERANCE, (
        f"losses or gradient norms differ from the CPU's by {worst:.1g} of their size; {TOLERANCE:.0e} is allowed"
        f" (losses {losses[0]}; on the CPU {losses[1]})"
    )
    return f"{STEPS} steps, differing from the CPU by at most {worst:.1e}"


def halves(subject: Subject) -> str:
    """The draft's products in bf16, the device's beside the CPU's: both round, so only losses are compared."""
    if "bf16" not in subject.spec.capabilities:
        return "declared absent: no capability 'bf16'"
    words = ("precision.compute=bfloat16",)
    wanted = _reference(*words)
    with tempfile.TemporaryDirectory() as folder:
        got = _train(subject.spec.name, Path(folder), *words)
    worst = max(abs(a - b) / abs(b) for (a, _), (b, _) in zip(got, wanted, strict=True))
    assert worst <= HALF_TOLERANCE, f"losses in bf16 differ from the CPU's by {worst:.1g}; {HALF_TOLERANCE} is allowed"
    return f"{STEPS} steps, losses differing from the CPU by at most {worst:.1e}"


def alone(subject: Subject) -> str:
    return _same(subject)


def ulysses(subject: Subject) -> str:
    needs_ranks(subject)
    return _same(subject, "parallel.ulysses=2", ranks=True)


def ring(subject: Subject) -> str:
    needs_ranks(subject)
    return _same(subject, "parallel.ring=2", ranks=True)


def data_parallel(subject: Subject) -> str:
    needs_ranks(subject)
    return _same(subject, ranks=True)


TRAINING = (
    Check("training: one process", alone, seconds=2 * SECONDS + 30),
    Check("training: two ranks share sequences (Ulysses, FSDP2)", ulysses, seconds=2 * SECONDS + 30),
    Check("training: two ranks share sequences (ring, FSDP2)", ring, seconds=2 * SECONDS + 30),
    Check("training: two ranks share batches (FSDP2)", data_parallel, seconds=2 * SECONDS + 30),
    Check("training: bf16", halves, seconds=2 * SECONDS + 30),
)
