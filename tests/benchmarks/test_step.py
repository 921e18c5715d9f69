"""The step's benchmark: what it compares is the same computation, and its JSON has what is promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ("--hidden", "64", "--intermediate", "96", "--vocabulary", "600", "--draft-vocabulary", "200", "--unroll", "3")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """(problem, eager_reference); scripts in a folder, so they are forgotten again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import eager_reference
    import problem

    yield problem, eager_reference
    for name in ("problem", "eager_reference", "floor"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("supervised", [1.0, 0.3])
def test_loss_and_every_gradient_are_the_eager_references(
    modules: tuple[ModuleType, ModuleType], supervised: float, dtype: str, bound: float
) -> None:
    """In fp32 both differ by rounding alone; in bf16 from the same weights and features, taken in fp32."""
    problems, eager = modules
    problem = problems.Problem(
        tokens=300, supervised=supervised, hidden=64, intermediate=96, vocabulary=600, draft_vocabulary=200, unroll=4,
        dtype=dtype,
    )  # fmt: skip
    inputs = problems.Inputs.of(problem)
    algorithm, draft = problems.make_draft(problem, inputs)
    from torchspec.core import registry

    result = algorithm.step(draft, inputs.head, inputs.rows, registry.load_device("cpu"))
    (result.numerator / result.denominator).backward()

    weights = {name: parameter.detach().float().requires_grad_() for name, parameter in draft.named_parameters()}
    shape = eager.Shape(
        heads=8, kv_heads=4, head_dim=8, rope_theta=problems.THETA, eps=problems.EPS, unroll=4,
        step_decay=algorithm.options.step_decay,
    )  # fmt: skip
    batch = eager.Batch(
        input_ids_BT=inputs.features.input_ids_T[None],
        loss_mask_BT=inputs.mask_T[None],
        taps_BTZ=inputs.features.taps_TNH.float().flatten(1)[None],
        last_BTH=inputs.features.last_TH.float()[None],
    )
    head = inputs.head
    want = eager.step_loss(weights, shape, batch, head.embedding_VH.float(), head.head_VH.float(), inputs.ids_N)
    want.backward()
    loss = result.numerator / result.denominator
    assert abs(loss.item() - want.item()) < bound * abs(want.item())
    for name, parameter in draft.named_parameters():
        grad = weights[name].grad
        assert parameter.grad is not None
        assert grad is not None
        assert float((parameter.grad.float() - grad).norm() / grad.norm()) < bound, name


class Multiplications(TorchDispatchMode):
    """FLOPs of matrix products, in place ones too."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        else:
            assert name not in ("bmm", "baddbmm", "linear"), f"{name} is not counted"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("supervised", [1.0, 0.1])
def test_a_step_multiplies_what_the_floor_lists_and_nothing_else(
    modules: tuple[ModuleType, ModuleType], supervised: float
) -> None:
    """Every product once: no row that is not supervised, no embedding's share twice, no target logits twice."""
    import floor

    from torchspec.core import registry

    problems, _ = modules
    problem = problems.Problem(
        tokens=1000, supervised=supervised, hidden=64, intermediate=96, vocabulary=600, draft_vocabulary=200, unroll=4
    )
    inputs = problems.Inputs.of(problem)
    algorithm, draft = problems.make_draft(problem, inputs)
    device = registry.load_device("cpu")
    with Multiplications() as count:
        result = algorithm.step(draft, inputs.head, inputs.rows, device)
        result.numerator.backward()
    assert count.flops == sum(item.flops for item in floor.products(problem))
    slots = problems.make_batch(problem, inputs).inputs.slots
    assert slots.whole == (supervised == 1.0)
    assert slots.index_BQ.shape[1] <= 1.2 * supervised * problem.tokens


def test_the_script_writes_what_it_promises(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    command = [sys.executable, str(BENCHMARKS / "step.py"), "--tokens", "96", "--rounds", "1", "--json", str(path)]
    # The script imports its neighbours, which the suite's safe path would hide.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run([*command, *SMALL], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    body = json.loads(path.read_text())
    for row in (body, body["checkpointed"], body["eager"]):
        assert {"cpu_seconds", "wall_seconds", "floor_cpu_seconds", "peak_mb_over_base", "over_floor"} <= row.keys()
        assert row["cpu_seconds"] > 0
    products = body["floor"]["products"]
    assert all(item["flops"] > 0 and item["cpu_seconds"] > 0 for item in products)
    head = next(item for item in products if item["name"] == "draft head")
    # Slot i predicts token i + 2 + k, which exists.
    pairs = sum(96 - 2 - k for k in range(3))
    assert (head["rows"], head["flops"]) == (pairs, 3 * 2 * pairs * 64 * 200)
    teacher = next(item for item in products if item["name"] == "teacher")
    assert teacher["flops"] == 2 * (96 - 2) * 64 * 600
    assert body["command"].startswith("python benchmarks/step.py --tokens 96")
    assert body["machine"]["torch"] == torch.__version__
