"""The loss over a target's head that real ranks share, each with rows and pairs of its own, against one process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
RANKS = (2, 3, 4)
SUMS = 8
"""Of all terms: expected, alpha, kept, reverse, two for JSD, two labels."""


@pytest.fixture(scope="module")
def sharded(cases: ModuleType) -> ModuleType:
    """sharded_case.py."""
    spec = importlib.util.spec_from_file_location("sharded_case", HERE / "sharded_case.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["sharded_case"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def all_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all cells, each rank's, in a directory for each number of ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, str(HERE / "sharded_worker.py"), str(directory)], check=True)
    return directory


@pytest.fixture(params=RANKS, ids=lambda ranks: f"{ranks}-ranks")
def results(request: pytest.FixtureRequest, all_results: Path) -> Path:
    return all_results / str(request.param)


def found(results: Path, sharded: ModuleType, cells: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """(cell, the whole case, what the ranks found together)."""
    stored = [load_file(path) for path in sorted(results.glob("*.safetensors"))]
    assert len(stored) in RANKS
    for cell in cells:
        parts: list[dict[str, Tensor]] = []
        for rank in stored:
            prefix = f"{cell.name}/"
            parts.append({name.removeprefix(prefix): x for name, x in rank.items() if name.startswith(prefix)})
        case = sharded.whole(cell, len(stored))
        yield cell, case, sharded.merged(cell, case, parts)


def test_float64(cases: ModuleType, sharded: ModuleType, results: Path) -> None:
    chosen = [cell for cell in sharded.cells() if cell.dtype == torch.float64]
    for cell, case, got in found(results, sharded, chosen):
        if not cell.rows:
            assert got.loss == 0, cell.name
            assert not any(gradient.any() for gradient in got.gradients().values()), cell.name
            continue
        cases.exactly(got, case.run(cell.most_rows, survey=cell.survey))
        if not cell.documents and not cell.capped:  # the reference knows neither
            cases.exactly(got, case.reference())


def test_float32(cases: ModuleType, sharded: ModuleType, results: Path) -> None:
    chosen = [cell for cell in sharded.cells() if cell.dtype == torch.float32 and not cell.saturated]
    for cell, case, got in found(results, sharded, chosen):
        want = case.run(cell.most_rows, survey=cell.survey)
        cases.compare(got, want, loss=2e-6, gradient=2e-6, terms=2e-6)


def test_saturated_logits_stay_finite_and_right(cases: ModuleType, sharded: ModuleType, results: Path) -> None:
    """The bounds of the same test of one process."""
    for cell, case, got in found(results, sharded, [cell for cell in sharded.cells() if cell.saturated]):
        want = case.reference()
        assert want.terms.cross_entropy_M.max() > 10 * cell.scale
        cases.compare(got, want, loss=1e-6, gradient=1e-3, terms=2e-3)


def test_bfloat16(cases: ModuleType, sharded: ModuleType, results: Path) -> None:
    """Of each gradient: no further from float64 than 1.5 times what one process is, or a rounding more: a rank rounds
    its own part."""
    for cell, case, got in found(results, sharded, [c for c in sharded.cells() if c.dtype == torch.bfloat16]):
        alone, want = case.run(cell.most_rows, survey=cell.survey), case.reference()
        assert cases.relative(got.loss, want.loss) < 1e-6
        for name, exact in want.gradients().items():
            ours, theirs = (cases.relative(each.gradients()[name], exact) for each in (got, alone))
            assert ours < max(1.5 * theirs, theirs + 2**-9), (cell.name, name)
        names = ("cross_entropy_M", "entropy_M", "alpha_M", "coverage_M")
        for name in (*names, "truth_M") if "ground_truth" in cell.weights else names:
            torch.testing.assert_close(
                getattr(got.terms, name).double(), getattr(want.terms, name).double(), rtol=1e-4, atol=1e-4, msg=name
            )
        assert torch.equal(got.terms.agree_M, want.terms.agree_M)


def reports(results: Path, cell: Any) -> list[dict[str, Any]]:
    return [json.loads((results / f"{cell.name}-{rank}.json").read_text()) for rank in range(int(results.name))]


def test_no_tensor_holds_all_tokens_and_the_vocabulary(sharded: ModuleType, results: Path) -> None:
    """None is larger than a chunk's logits in one process: its rows by the target's tokens, or its pairs by the
    draft's, with a column more for each rank and statistics beside them."""
    ranks = int(results.name)
    for cell in sharded.watched():
        draft = cell.vocabulary if cell.ids == "whole" else -(-cell.vocabulary // 3)
        most = cell.most_rows * max(cell.vocabulary + 10 * ranks, 3 * (draft + ranks))
        assert most < cell.rows * cell.vocabulary / 4
        for report in reports(results, cell):
            assert cell.vocabulary < report["largest"] <= most, cell.name


def sent(cell: Any, case: Any, edges: tuple[int, ...]) -> dict[str, int]:
    """Bytes that a rank hands to each kind of collective, for the mix of all terms (docs/long-sequences.md)."""
    ranks, size, target = len(edges) - 1, cell.hidden, case.vocabulary.target_size
    item, wide = cell.dtype.itemsize, max(4, cell.dtype.itemsize)
    cuts = torch.tensor([target * rank // ranks for rank in range(ranks + 1)])
    columns = int(torch.searchsorted(case.vocabulary.ids_N, cuts).diff().max())
    pruned = case.vocabulary.size < target
    chunks = max(-(-(last - first) // cell.most_rows) for first, last in pairwise(edges))
    given = {"_allgather_base_": 8 + 16 * chunks, "alltoall_base_": 0, "allreduce_": 0}
    for place in range(chunks):
        starts = [first + (last - first) * place // chunks for first, last in pairwise(edges)]
        stops = [first + (last - first) * (place + 1) // chunks for first, last in pairwise(edges)]
        rows = [stop - start for start, stop in zip(starts, stops, strict=True)]
        pairs = [int(((case.row_M >= i) & (case.row_M < j)).sum()) for i, j in zip(starts, stops, strict=True)]
        given["_allgather_base_"] += (1 + cell.survey) * max(rows) * size * item
        if cell.form == "tokens":
            given["alltoall_base_"] += ranks * max(rows) * ((1 + cell.survey) * columns * item + 3 * wide * pruned)
            continue
        kinds = 1 + pruned + cell.survey  # of the draft's tokens, of all; of the draft's once more after a survey
        statistics = 3 * sum(pairs) + 3 * max(pairs) + 3 * kinds * sum(rows)
        given["_allgather_base_"] += max(pairs) * size * item + statistics * wide
        given["allreduce_"] += (SUMS * sum(pairs) + sum(rows)) * wide
        given["alltoall_base_"] += ranks * max(pairs) * size * item
    return {kind: count for kind, count in given.items() if count}


def test_what_is_sent(sharded: ModuleType, results: Path) -> None:
    ranks = int(results.name)
    for cell in sharded.watched():
        want = sent(cell, sharded.whole(cell, ranks), sharded.bounds(cell, ranks))
        assert [report["sent"] for report in reports(results, cell)] == ranks * [want], cell.name
