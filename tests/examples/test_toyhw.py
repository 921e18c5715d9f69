"""The device of examples/torchspec-toyhw: found by its entry point, strict about places, and training as on the CPU.

It is built once (conftest.py), where subprocesses find it.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchspec-toyhw"
WORKER = Path(__file__).with_name("toyhw_worker.py")
STEPS, STOP = 6, 3

CLOSE = 3e-6
"""Relative, in float32: the device attends by plain products, the CPU by its flash kernel (4e-7 was seen)."""

ALONE = "one rank, packed rows"
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    ALONE: (1, ("train.tokens_per_rank=96",)),
    "two data ranks": (2, ("train.micro_batch_size=2",)),
    "ulysses": (2, ("train.micro_batch_size=2", "parallel.ulysses=2", "parallel.exchange=ulysses")),
    "ring": (
        2,
        ("parallel.ring=2", "parallel.exchange=ring", "train.tokens_per_rank=48", "target.shard_logits=vocabulary"),
    ),
    "target held together": (
        2,
        ("train.micro_batch_size=2", "parallel.ulysses=2", "target.tensor_parallel=2", "train.recompute=true"),
    ),
}
"""Ranks and settings, for both devices."""


def python(code: str, variables: dict[str, str]) -> dict[str, Any]:
    """What `code` leaves in `found`."""
    lines = f"import json\nfound = {{}}\n{code}\nprint(json.dumps(found))"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", lines], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_the_adapter_is_small_and_uses_the_public_api_alone() -> None:
    files = sorted((EXAMPLE / "toyhw").glob("*.py"))
    assert sum(len(file.read_text().splitlines()) for file in files) < 300
    imported = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert {name for name in imported if name and name.startswith("torchspec")} == {
        "torchspec.devices.api",
        "torchspec.devices.parts",
    }


def test_doctor_lists_the_device(installed: dict[str, str]) -> None:
    command = [sys.executable, "-P", "-m", "torchspec", "doctor", "--json"]
    ran = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=120, check=False)
    listed = {entry["name"]: entry for entry in json.loads(ran.stdout)["devices"]}
    assert listed["toyhw"]["available"], listed["toyhw"]
    assert "torchspec-toyhw" in listed["toyhw"]["registered_by"]


def test_without_its_extension_it_says_so_and_nothing_is_loaded(installed: dict[str, str], tmp_path: Path) -> None:
    place = Path(installed["PYTHONPATH"])
    shutil.copytree(place, tmp_path / "place", ignore=shutil.ignore_patterns("*.so"))
    probed = """
import sys
from torchspec.core.registry import devices
answer = devices().spec("toyhw").probe()
found |= {"ok": answer.ok, "hint": answer.hint, "loaded": [name for name in sys.modules if name.startswith("toyhw.")]}
"""
    assert python(probed, installed) == {"ok": True, "hint": "", "loaded": []}
    without = python(probed, {**installed, "PYTHONPATH": str(tmp_path / "place")})
    assert not without["ok"]
    assert "pip install" in without["hint"]


PLACES = """
import torch
from torchspec.core.registry import load_device
device = load_device("toyhw")
here = device.runtime.bind(1)
x, ids = torch.ones(3, 2, device=here), torch.tensor([0, 2])
for name, mixed in {
    "host": lambda: x + torch.ones(3, 2),
    "host index": lambda: x[ids],
    "host index put": lambda: x.index_put_((ids,), torch.ones(2, 2)),
    "into the host": lambda: torch.add(x, x, out=torch.empty(3, 2)),
    "list": lambda: torch.cat([x, torch.ones(3, 2)]),
    "other device": lambda: x + torch.ones(3, 2, device="toyhw:0"),
}.items():
    try:
        mixed()
        found[name] = "computed"
    except RuntimeError as error:
        found[name] = str(error).splitlines()[0]
found["number"] = (x * torch.tensor(2.0)).cpu().tolist()
found["copies"] = [str((x.to("toyhw:3") * 2).device), str(x.cpu().device), str(torch.ones(2).to(here).device)]
out = torch.empty(0, device=here)
found["out"] = [torch.add(x, x, out=out) is out, out.cpu().tolist()]
"""


def test_tensors_of_two_places_do_not_mix(installed: dict[str, str]) -> None:
    found = python(PLACES, installed)
    for name in ("host", "host index", "host index put", "into the host", "list", "other device"):
        assert "toyhw:1 and " in found[name], (name, found[name])  # some are refused by PyTorch, before they get there
    assert found["number"] == [[2.0, 2.0]] * 3
    assert found["copies"] == ["toyhw:3", "cpu", "toyhw:1"]
    assert found["out"] == [True, [[2.0, 2.0]] * 3]


RUNTIME = """
import torch
from torchspec.core.registry import load_device
runtime = load_device("toyhw").runtime
place = runtime.bind(2)
x = torch.zeros(1 << 20, device=place)
y = x.exp()
found["two"] = runtime.memory().allocated
del x
found["one"], found["peak"] = runtime.memory().allocated, runtime.memory().peak
runtime.reset_peak_memory()
found["reset"] = runtime.memory().peak
found["elsewhere"] = torch.toyhw.memory_allocated(0)
runtime.limit_memory((5 << 20) / runtime.memory().total)
try:
    torch.empty(1 << 20, device=place)
    found["refused"] = False
except torch.OutOfMemoryError:
    found["refused"] = True
runtime.limit_memory(1.0)
runtime.manual_seed(5)
state, host = runtime.rng_state(), torch.rand(3).tolist()
first = torch.rand(3, device=place).tolist()
runtime.set_rng_state(state)
found["drawn"] = [first, torch.rand(3, device=place).tolist(), host]
generator = torch.Generator(place).manual_seed(5)
found["own generator"] = torch.rand(3, device=place, generator=generator).tolist()
copies = runtime.upload([torch.arange(4), torch.ones(2)])()
found["uploaded"] = [[str(copy.device), copy.cpu().tolist()] for copy in copies]
found["pinned"] = [torch.ones(3).pin_memory()[1:].is_pinned(), torch.ones(3).is_pinned()]
before, after = torch.Event(place, enable_timing=True), torch.Event(place, enable_timing=True)
before.record()
torch.ones(1 << 20, device=place).sum()
after.record()
found["milliseconds"] = before.elapsed_time(after)
with torch.autocast("toyhw", dtype=torch.bfloat16):
    product = torch.ones(2, 2, device=place) @ torch.ones(2, 2, device=place)
    found["autocast"] = [str(product.dtype), str(product.softmax(-1).dtype)]
view = torch.arange(6.0, device=place).view(2, 3).T[1:]
found["view"] = view.contiguous().cpu().tolist()
"""


def test_memory_random_numbers_streams_and_autocast(installed: dict[str, str]) -> None:
    found = python(RUNTIME, {**installed, "TOYHW_VISIBLE_DEVICES": "3,2,0"})
    assert found["two"] == 8 << 20
    assert (found["one"], found["peak"], found["reset"], found["elsewhere"]) == (4 << 20, 8 << 20, 4 << 20, 0)
    assert found["refused"]
    first, again, host = found["drawn"]
    assert first == again == host == found["own generator"]
    assert found["uploaded"] == [["toyhw:2", [0, 1, 2, 3]], ["toyhw:2", [1.0, 1.0]]]
    assert found["pinned"] == [True, False]
    assert found["milliseconds"] > 0
    assert found["autocast"] == ["torch.bfloat16", "torch.float32"]
    assert found["view"] == [[1.0, 4.0], [2.0, 5.0]]


@pytest.fixture(scope="module")
def trained(installed: dict[str, str], tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of RUNS on both devices; and on toyhw alone a run that stops and goes on, and one with engines of its
    own. One process imports for all of them."""
    place = tmp_path_factory.mktemp("trained")
    words = ["the", "quick", "brown", "fox", "returns", "value", "of", "function", "and", "list", "all", "values"]
    for name, numbers in {"train": range(13), "validation": range(13, 16)}.items():
        texts = {n: (" ".join(words[n % 5 :][:4]), " ".join(words[n % 7 :] + words[: n % 5])) for n in numbers}
        lines = [
            {"id": f"c{n}", "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
            for n, (ask, answer) in texts.items()
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "target": {"path": str(tiny_target)},
        "data": {
            "train": [str(place / "train.jsonl")],
            "validation": [str(place / "validation.jsonl")],
            "cache_dir": str(place / "cache"),
            "max_length": 96,
        },
        "train": {
            "batch_size": 4, "epochs": 2, "max_steps": STEPS, "schedule": "constant", "warmup_steps": 1,
            "checkpoint_every": STOP,
        },
        "eval": {"samples": 3, "max_new_tokens": 6, "draft_length": 2, "every": STOP},
        "draft": {"unroll": 3, "vocab_size": 100},
    }  # fmt: skip
    stores: list[TCPStore] = []
    jobs: list[dict[str, Any]] = []

    def job(device: str, name: str, ranks: int, *words: str) -> None:
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)))
        told = {**values, "device": device, "output": str(place / device / name)}
        jobs.append({"values": told, "words": words, "ranks": ranks, "port": stores[-1].port})

    for name, (ranks, settings) in RUNS.items():
        for device in ("cpu", "toyhw"):
            job(device, name, ranks, *settings)
    alone = RUNS[ALONE][1]
    job("toyhw", "goes on", 1, *alone, f"train.max_steps={STOP}")
    job("toyhw", "goes on", 1, *alone)
    job("toyhw", "colocated", 1, *alone, "pipeline.topology=colocated", "pipeline.store=device", "eval.every=0")
    (place / "jobs.json").write_text(json.dumps(jobs))
    ran = subprocess.run(
        [sys.executable, "-P", str(WORKER), str(place / "jobs.json")],
        env=installed, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-8000:]
    return place


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def figures(run: Path) -> list[tuple[Any, ...]]:
    """Of every step, to the last bit."""
    return [
        tuple(row[name] for name in ("step", "loss", "grad_norm", "tokens", "samples")) for row in rows(run, "train")
    ]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_the_cpu(trained: Path, name: str) -> None:
    cpu, toyhw = trained / "cpu" / name, trained / "toyhw" / name
    assert len(figures(toyhw)) == STEPS
    for expected, found in zip(figures(cpu), figures(toyhw), strict=True):
        assert found == pytest.approx(expected, rel=CLOSE)
    for expected_row, row in zip(rows(cpu, "validation"), rows(toyhw, "validation"), strict=True):
        assert row["acceptance_length"] == expected_row["acceptance_length"]
    assert list((toyhw / "draft").glob("*.safetensors"))


def test_memory_is_that_of_the_device(trained: Path) -> None:
    """Weights, their gradients and moments, and not the process's resident memory."""
    for row in rows(trained / "toyhw" / ALONE, "train"):
        assert 0 < row["memory"]["allocated"] <= row["memory"]["peak"] < 100e6


def test_a_run_goes_on_where_it_stopped(trained: Path) -> None:
    assert figures(trained / "toyhw" / "goes on") == figures(trained / "toyhw" / ALONE)


def test_engines_hand_features_over_in_device_memory(trained: Path) -> None:
    assert figures(trained / "toyhw" / "colocated") == figures(trained / "toyhw" / ALONE)
