"""A short training through the command line with the engine, and with transformers: the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from torchspec.backends.conformance.capture import START
from torchspec.backends.conformance.subject import Subject
from torchspec.core.conformance.checks import Check

STEPS = 4
SECONDS = 2 * START + 300.0
"""Two trainings, each of which may take START and then says why it is stopped, and what is around them."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_WORDS = (
    "precision.compute=float32", "train.batch_size=4", "train.micro_batch_size=2", f"train.max_steps={STEPS}",
    "data.max_length=96", "draft.unroll=3", "seed=3",
)  # fmt: skip


def _conversations() -> str:
    """Texts of which a tokenizer of any kind makes some tokens."""
    rows = []
    for n in range(4 * STEPS):
        answer = f"{n} plus {n + 3} is {2 * n + 3}. " * (2 + n % 5)
        question = {"role": "user", "content": f"What is {n} plus {n + 3}?"}
        rows.append({"messages": [question, {"role": "assistant", "content": answer}]})
    return "".join(json.dumps(row) + "\n" for row in rows)


def _train(subject: Subject, folder: Path, backend: str, *words: str) -> list[float]:
    setting = subject.setting
    data, output = folder / "data.jsonl", folder / backend
    data.write_text(_conversations())
    command = [
        sys.executable, "-P", "-m", "torchspec", "train", "--target", setting.target, "--device", setting.device,
        "--backend", backend, "--data", str(data), "--output", str(output), f"target.dtype={setting.dtype}",
        f"target.trust_remote_code={str(setting.trust_remote_code).lower()}", *_WORDS, *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=START, check=False)
    said = " | ".join(line.strip() for line in done.stderr.splitlines()[-3:])
    assert done.returncode == 0, f"`torchspec train --backend {backend}` ended with code {done.returncode}: {said}"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def losses(subject: Subject) -> str:
    subject.close()
    told = [
        f"engine.{name}={json.dumps(value) if isinstance(value, dict) else value}"
        for name, value in subject.setting.process.items()
        if value not in (None, {})
    ]
    with tempfile.TemporaryDirectory() as folder:
        wanted = _train(subject, Path(folder), "hf")
        got = _train(subject, Path(folder), subject.setting.name, *told)
    assert len(got) == len(wanted) == STEPS, f"{len(got)} steps, not {STEPS}"
    worst = max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))
    allowed = TOLERANCE[subject.dtype]
    assert worst <= allowed, f"losses {got}, with transformers {wanted}: off by {worst:.1g}; {allowed:.0e} is allowed"
    return f"{STEPS} steps, losses differing from transformers' by at most {worst:.1e}"


TRAINING = (Check("training: the losses of transformers", losses, SECONDS),)
