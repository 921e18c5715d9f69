"""One rank of tiny runs: `worker.py cells.json results/`.

Every cell runs in a fork, so it may be killed, and meets its peers at its own port; rank 0 writes what came of it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import runpy
import signal
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo  # the optimizer imports it at its first step: once here instead of in every fork
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from torchspec.core import settings
from torchspec.core.config.schema import EvalConfig
from torchspec.core.data.prompts import Prompt
from torchspec.core.errors import TorchspecError
from torchspec.core.parallel import mesh
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training import checkpoint, validation
from torchspec.core.training.metrics import MetricsLog
from torchspec.core.training.sharding import unsharded_state
from torchspec.core.training.signals import StopRequest
from torchspec.core.training.timing import StepTimer
from torchspec.core.training.window import run_window

forked = runpy.run_path(str(Path(__file__).parents[2] / "forked.py"))

Cell = dict[str, Any]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make_job(tiny: ModuleType, cell: Cell, results: Path) -> Any:
    samples = tiny.TinySamples(count=cell.get("count", 13), unsupervised=cell.get("unsupervised", ()))
    return tiny.Job(
        directory=results / cell.get("directory", cell["name"]),
        config=cell.get("config", {}),
        dtype=getattr(torch, cell.get("dtype", "float32")),
        dropout=cell.get("dropout", 0.0),
        samples=samples,
        compute=cell.get("compute", "float32"),
        facts=cell.get("facts", {}),
        objective=cell.get("objective"),
    )


def gradients(tiny: ModuleType, cell: Cell, context: ParallelContext, results: Path) -> None:
    """Undivided gradients of the first window, then parameters, losses and norms of `steps` updates."""
    trainer = tiny.make_trainer(make_job(tiny, cell, results), context)
    batch = trainer.plan.batch(0)
    timer = StepTimer(context.torch_device)
    window = run_window(trainer.model, trainer.samples, trainer.plan.turns(0), trainer.feed, context, timer)
    tensors: dict[str, Tensor] = {f"sum.{name}": value for name, value in window.sums.values.items()}
    tensors["batch"] = torch.tensor(batch)
    for name, parameter in trainer.model.draft.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        tensors[f"grad.{name}"] = parameter.grad.full_tensor()
    trainer.optimizer.zero_grad()
    tensors |= {f"start.{name}": value for name, value in unsharded_state(trainer.model.draft).items()}
    rows = [trainer._step() for _ in range(cell.get("steps", 3))]
    tensors |= {f"param.{name}": value for name, value in unsharded_state(trainer.model.draft).items()}
    tensors["norms"] = torch.tensor([row["grad_norm"] or 0.0 for row in rows], dtype=torch.float64)
    tensors["losses"] = torch.tensor([row["loss"] or 0.0 for row in rows], dtype=torch.float64)
    tensors["tokens"] = torch.tensor([row["tokens"] for row in rows])
    if context.is_main:
        whole = {name: value.contiguous() for name, value in tensors.items()}
        save_file(whole, results / f"{cell['name']}.safetensors")


def train(tiny: ModuleType, cell: Cell, context: ParallelContext, results: Path) -> None:
    """A run with metrics and checkpoints that continues what is there.

    kill = [step, signal name, rank]; kill_after = Python calls until SIGKILL, counted from the start or from the first
    step that is at least kill_from; file_limit = [from this step, largest
    file in bytes, rank]; scores = acceptance length to report at each step; kill_validating = [step, rank].
    """
    job = make_job(tiny, cell, results)

    def validate() -> dict[str, Any]:
        if cell.get("kill_validating") == [trainer.counters.step, context.rank]:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"acceptance_length": cell["scores"][str(trainer.counters.step)]}

    every = cell.get("validate_every", 0)
    trainer = tiny.make_trainer(job, context, validate if "scores" in cell else None, every)
    if "kill_after" in cell and "kill_from" not in cell:
        kill_after(cell["kill_after"])
    chosen = checkpoint.choose(trainer.setup.checkpoints, context)
    if chosen is not None:
        trainer.resume(chosen)
    counters = trainer.counters
    started = counters.step
    if context.is_main:
        report(results, cell, {"started": started})  # for cells that are killed
    path = job.directory / "metrics.jsonl" if context.is_main else None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(path, after_step=started, validated=counters.validated_step == started)

    def progress(stage: str, step: int, total: int) -> None:
        if step >= cell.get("kill_from", math.inf) and sys.getprofile() is None:
            kill_after(cell["kill_after"])
        if "file_limit" in cell and step == cell["file_limit"][0] and context.rank == cell["file_limit"][2]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (cell["file_limit"][1], resource.RLIM_INFINITY))
        if "kill" in cell and step == cell["kill"][0] and context.rank == cell["kill"][2]:
            os.kill(os.getpid(), getattr(signal, f"SIG{cell['kill'][1]}"))

    with log, StopRequest() as stop:
        outcome = trainer.run(log, stop, progress)
    if context.is_main:
        report(results, cell, {"step": outcome.step, "signal": outcome.signal, "started": started})


def kill_after(calls: int) -> None:
    """SIGKILL at a function call counted from here: a point in the program, whatever the machine's speed."""
    left = calls

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def failed_validation(tiny: ModuleType, cell: Cell, context: ParallelContext, results: Path) -> None:
    """Decoding fails on the last rank; what every rank raises."""
    trainer = tiny.make_trainer(make_job(tiny, cell, results), context, validate_every=cell["validate_every"])
    prompts = [Prompt(sample_id=f"p{n}", input_ids=tuple(range(n, n + 3))) for n in range(4)]
    validator = validation.Validator(
        model=trainer.model, vocabulary=trainer.setup.vocabulary, prompts=prompts, skipped=0, settings=EvalConfig(),
        seed=0, compute="float32", context=context,
    )  # fmt: skip
    trainer.setup = replace(trainer.setup, validate=validator)

    def evaluate(*arguments: Any, **named: Any) -> Any:
        raise TorchspecError("no luck")

    if context.rank == context.world_size - 1:
        validation.evaluate = evaluate
    said = "nothing"
    try:
        with MetricsLog(None) as log, StopRequest() as stop:
            trainer.run(log, stop)
    except TorchspecError as error:
        said = f"{type(error).__name__}: {error}"
    gathered = context.gather(said)
    if context.is_main:
        report(results, cell, {"ranks": gathered})


def agreement(tiny: ModuleType, cell: Cell, context: ParallelContext, results: Path) -> None:
    """What the ranks tell each other."""
    mesh.HEARTBEAT_SECONDS = 0.05
    found: dict[str, Any] = {
        "sum": context.sum([context.rank, 1]),
        "max": context.max([context.rank, -context.rank]),
        "broadcast": context.broadcast({"who": context.rank, "text": "ü"}),
        "gather": context.gather("x" * context.rank),
        "main_only": context.main_only(lambda: threading.Event().wait(0.3)),
        "main_first": context.main_first(lambda: context.rank),
    }
    for name, failing in (("last", context.world_size - 1), ("main", 0)):
        run = context.agree if name == "last" else context.main_only

        def work(failing: int = failing) -> None:
            if context.rank == failing:
                raise TorchspecError("no luck")

        try:
            run(work)
        except TorchspecError as error:
            found[f"failure_{name}"] = f"{type(error).__name__}: {error}"
    gathered = context.gather(found)
    if context.is_main:
        report(results, cell, {"ranks": gathered})


def patience(tiny: ModuleType, cell: Cell, context: ParallelContext, results: Path) -> None:
    """Work that takes longer than the deadline, on the last rank only; then a last rank that never comes."""
    deadline = timedelta(seconds=2)
    mesh.HEARTBEAT_SECONDS = 0.1
    short = replace(
        context,
        control=dist.new_group(backend="gloo", timeout=deadline),
        pulse=dist.new_group(backend="gloo", timeout=deadline),
    )
    last = context.rank == context.world_size - 1

    def work() -> int:
        threading.Event().wait(3.0 if last else 0.0)
        return context.rank

    context.gather("ready")
    found: dict[str, Any] = {"agree": short.main_first(work)}
    if not last:
        try:
            short.agree(work)
        except TorchspecError as error:
            found["lost"] = f"{type(error).__name__}: {error}"
    gathered = context.gather(found)
    if context.is_main:
        report(results, cell, {"ranks": gathered})


def report(results: Path, cell: Cell, found: dict[str, Any]) -> None:
    (results / f"{cell['name']}.json").write_text(json.dumps(found))


def fp8_weights(tiny: ModuleType, cell: Cell, context: ParallelContext, results: Path) -> None:
    load("fp8_weights").run(cell, context, results)


def run_cell(cell: Cell, results: Path) -> None:
    os.environ["MASTER_PORT"] = str(cell["port"])
    tiny = load("tiny_run")
    context = mesh.start(tiny.cpu(), settings.launch(), timedelta(seconds=60))
    kinds = {
        "gradients": gradients,
        "train": train,
        "agreement": agreement,
        "failed validation": failed_validation,
        "patience": patience,
        "fp8 weights": fp8_weights,
    }
    try:
        kinds[cell["kind"]](tiny, cell, context, results)
    except TorchspecError as error:
        report(results, cell, {"error": type(error).__name__, "message": str(error)})
    mesh.shutdown(context)


def main() -> int:
    torch.set_num_threads(1)
    results = Path(sys.argv[2])
    for cell in json.loads(Path(sys.argv[1]).read_text()):
        failed = forked["run_ranks"](run_cell, [(cell, results)])
        if failed and not any(key.startswith("kill") for key in cell):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
