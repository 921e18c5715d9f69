"""Weights gathered in FP8 by real processes: what the draft sees is what the whole weight comes to, after every change.

That a run's losses and gradients stay what they are is in test_fp8_ranks.py, and that runs go on with and without it in
test_fp8_run.py (tests/core/pipeline).
"""

from __future__ import annotations

import gc
import math
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from torchspec.core.ops.fp8 import E4M3, Scaled, Scaling, emulated_scaled_mm, scaled
from torchspec.core.parallel.mesh import ParallelContext
from torchspec.core.training.fp8_gather import Fp8Gather, _Sharded

SMALL = 3 * 32 * 4
RANKS = (1, 3)
CELLS = [
    *({"name": scaling, "gather": True, "scaling": scaling} for scaling in ("row", "tensor")),
    {"name": "offloaded", "gather": True, "scaling": "tensor", "offload": True},
    {"name": "bf16", "gather": False},
]
GATHERED: dict[str, Scaling] = {"row": "row", "tensor": "tensor", "offloaded": "tensor"}
Results = dict[tuple[int, str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def results(run_cells: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    cells = [{"kind": "fp8 weights", **cell} for cell in CELLS]
    found: Results = {}
    for ranks in RANKS:
        here = run_cells(cells, ranks, tmp_path_factory.mktemp("gathered"))
        found |= {(ranks, path.stem): load_file(path) for path in here.glob("*.safetensors")}
    return found


def seen(found: dict[str, Tensor], stage: str, name: str) -> Scaled:
    values = found[f"{stage}.seen.{name}.values"].view(E4M3)
    return Scaled(values=values, scale=found[f"{stage}.seen.{name}.scale"])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("cell", GATHERED)
def test_what_the_draft_sees_is_the_whole_weight_put_into_fp8(
    results: Results, fp8_weights: ModuleType, ranks: int, cell: str
) -> None:
    """To the last bit, in bf16 as every product takes it; with the masters as they are then."""
    found, before = results[ranks, cell], None
    for stage in ("fresh", "again", "updated", "loaded"):
        scales = []
        for name, (rows, _) in fp8_weights.SHAPES.items():
            got = seen(found, stage, name)
            whole = scaled(found[f"{stage}.master.{name}"].bfloat16(), E4M3, GATHERED[cell], SMALL)
            assert got.scale.shape == (rows if GATHERED[cell] == "row" else 1, 1)
            assert torch.equal(got.scale, whole.scale), (stage, name)
            assert torch.equal(got.values.view(torch.uint8), whole.values.view(torch.uint8)), (stage, name)
            scales.append(got.scale.max().item())
        assert len(set(scales)) == len(scales), "else one weight could have another's"
        assert (scales == before) == (stage == "again"), "else an old scale would go unseen"
        before = scales


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("cell", GATHERED)
def test_masters_get_the_gradients_and_updates_that_they_get_without(
    results: Results, fp8_weights: ModuleType, ranks: int, cell: str
) -> None:
    """Gradients are added up over ranks and gathers."""
    found, other = results[ranks, cell], results[ranks, "bf16"]
    for stage, factor in zip(fp8_weights.STAGES, (1, 1, 2, 3, 4), strict=True):
        for name, shape in fp8_weights.SHAPES.items():
            assert torch.equal(found[f"{stage}.grad.{name}"], torch.full(shape, 3.0 * factor * ranks))
        for name in (*fp8_weights.SHAPES, "bias"):
            for what in ("master", "grad"):
                got, wanted = found[f"{stage}.{what}.{name}"], other[f"{stage}.{what}.{name}"]
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("cell", GATHERED)
def test_what_is_not_finite_on_one_rank_makes_nan_on_all_what_its_scale_belongs_to(
    results: Results, ranks: int, cell: str
) -> None:
    """The last row of `first` has a NaN, that of `second` an infinity, as the other matrices have none."""
    found = results[ranks, cell]
    for name in ("first", "second"):
        got, whole = seen(found, "spoilt", name), found[f"spoilt.master.{name}"].bfloat16()
        wanted = scaled(whole, E4M3, GATHERED[cell], SMALL)
        one = scaled(torch.ones(16, whole.shape[1]), E4M3, "row", SMALL)
        products = [emulated_scaled_mm(operand, one, torch.float32).isnan() for operand in (got, wanted)]
        assert torch.equal(*products)
        assert products[0].any()
    assert seen(found, "spoilt", "third").scale.isfinite().all()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("cell", [*GATHERED, "bf16"])
def test_a_gather_sends_a_byte_an_element_and_a_number_for_each_scale(
    results: Results, fp8_weights: ModuleType, ranks: int, cell: str
) -> None:
    """Of each rank its rows, padded to as many as another has. One rank sends none."""
    found, shapes = results[ranks, cell], fp8_weights.SHAPES.values()
    elements = sum(math.ceil(rows / ranks) * columns for rows, columns in shapes)
    matrices = elements if cell in GATHERED else 2 * elements
    rest = 2 * math.ceil(7 / ranks)
    scales = {"row": sum(rows for rows, _ in shapes), "tensor": len(shapes)}
    for stage in fp8_weights.STAGES:
        assert found[f"{stage}.gathered"].item() == (matrices + rest if ranks > 1 else 0)
        assert found[f"{stage}.reduced"].tolist() == [4 * scales[GATHERED[cell]] if cell in GATHERED else 0]


def test_a_shard_in_the_hosts_memory_is_followed_to_the_device(context: ParallelContext) -> None:
    """FSDP asks for a copy there, which has to say what to send; here the device is the host, and the copy is one."""
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(48, 32, generator=generator)
    weight = _Sharded(master=master, shape=master.shape, places=slice(0, 1))
    gather = Fp8Gather(
        scaling="tensor", dtype=torch.bfloat16, temporary_bytes=SMALL, weights=[weight], scale_N=torch.ones(1)
    )
    gather.attach_on_host(0, master)
    moved = master.to("cpu", copy=True)
    assert moved.data_ptr() != master.data_ptr()
    (sent,), _ = moved.fsdp_pre_all_gather(context.every, master.shape, master.stride(), None, None)  # type: ignore[attr-defined]
    whole = scaled(master.bfloat16(), E4M3, "tensor", SMALL)
    assert torch.equal(sent, whole.values.view(torch.uint8))
    assert gather.scale_N.tolist() == whole.scale.flatten().tolist()
    gone = weakref.ref(moved)
    gc.disable()
    try:
        del moved
        assert gone() is None, "the device's memory would wait for a collection"
    finally:
        gc.enable()
