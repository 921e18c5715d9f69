"""However ranks share sequences, loss, metrics and every gradient are those of one process that owns everything.

Ranks are real processes over gloo. The one process is held against the definitions in test_oracle.py of
tests/core/algorithms/eagle3 and tests/core/algorithms/blocks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

WORKER = Path(__file__).with_name("sequence_worker.py")
Cell = dict[str, Any]
Results = dict[str, dict[str, Tensor]]

SHAPES = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4))
LIMITS = {"float64": 1e-12, "float32": 2e-6}
PACKED = 40  # tokens of a row per rank; the longest document has 61


def exchanges(ulysses: int, ring: int) -> list[str]:
    if ulysses * ring == 1:
        return ["gather"]
    return ["gather", "usp", *(["ulysses"] if ring == 1 else []), *(["ring"] if ulysses == 1 else [])]


# What the second window's loss is depends on the first.
OBJECTIVE = {"lk_lambda": 1.0, "kl": 0.2, "tv": {"start": 0.0, "end": 0.3}}

BLOCKS = {"block_size": 4, "num_layers": 2, "layer_types": ["full", "sliding"], "sliding_window": 9, "taps": [1, 3, 4]}

LATENT = {
    "attention": "mla", "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}  # fmt: skip


def problem(**changes: Any) -> Cell:
    """What the numbers depend on, and no way of computing them."""
    return {"dtype": "float64", "supervision": "dense", "kv_heads": 4, "options": {}} | changes


PROBLEMS = {
    "dense": problem(),
    "sparse": problem(supervision="sparse"),
    "none": problem(supervision="none"),
    "per-sequence": problem(supervision="sparse", options={"normalisation": "per_sequence", "coverage": "weight"}),
    "one-key-head": problem(kv_heads=1),
    "two-key-heads": problem(kv_heads=2),
    "holes": problem(fails=[2, 5]),
    "float32": problem(dtype="float32", supervision="sparse"),
    "bfloat16": problem(dtype="bfloat16", supervision="sparse"),
    "remembering": problem(supervision="sparse", options={"objective": OBJECTIVE, "coverage": "weight"}, windows=2),
    "eagle3.1": problem(supervision="sparse", algorithm="eagle3.1"),
    "blocks": problem(algorithm="dflash", steps=BLOCKS | {"layer_types": ["sliding"] * 2}, options={"num_anchors": 7}),
    "blocks-paced": problem(
        supervision="sparse",
        algorithm="dflash",
        steps=BLOCKS,
        kv_heads=2,
        options={
            "weighting": "dpace",
            "sample_from_anchor": True,
            "sliding_window_non_causal": True,
            "normalisation": "per_sequence",
            "coverage": "weight",
        },
    ),
    "latent": problem(supervision="sparse", options=LATENT),
}


def reference(key: str) -> Cell:
    """One process's; what cannot be captured teaches what an unsupervised document teaches, nothing."""
    given = dict(PROBLEMS[key])
    return {**given, "name": f"reference-{key}", "unsupervised": given.pop("fails", []), "fails": []}


def cells(ranks: int) -> list[Cell]:
    """Every way of sharing that this many ranks allow, with what makes it go wrong."""
    made = []
    for ulysses, ring in SHAPES:
        data, rest = divmod(ranks, ulysses * ring)
        if rest or data not in (1, 2):
            continue
        for exchange in exchanges(ulysses, ring):
            how = {"ulysses": ulysses, "ring": ring, "exchange": exchange}
            name = f"{ulysses}x{ring}-{exchange}-dp{data}"
            for key in PROBLEMS:
                if key in ("remembering", "eagle3.1") and (exchange != "gather" or ranks == 8):
                    continue  # what is remembered, and norms of single slots, know nothing of exchanges
                if (key.startswith("blocks") or key == "latent") and ranks == 8:
                    continue
                if data == 2 and key not in ("dense", "sparse", "holes", "float32", "remembering", "eagle3.1"):
                    continue  # of the sharing alone; data parallelism has its own tests
                for packed in (False, True) if key in ("sparse", "latent") else (list(PROBLEMS).index(key) % 2 == 0,):
                    rows = {"row_tokens": max(PACKED * ulysses * ring, 61)} if packed else {}
                    label = f"{name}-{key}-{'packed' if packed else 'rows'}"
                    lean = packed and key in ("sparse", "latent")
                    memory = {"recompute": lean, "offload": lean}
                    made.append({**PROBLEMS[key], **how, **rows, **memory, "problem": key, "name": label})
    made += [
        {**PROBLEMS["remembering"], "problem": "remembering", "micro_batch_size": size, "name": f"in-{size}s-{ranks}"}
        for size in ((1, 4, 8) if ranks == 1 else ())
    ]
    return [*made, *shared_head_cells(ranks)]


def shared_head_cells(ranks: int) -> list[Cell]:
    """The target's head over those who share a sequence, or over all where nobody does."""
    return [
        {**PROBLEMS[key], "problem": key, "ulysses": u, "ring": r, "row_tokens": max(PACKED * u * r, 61),
         "shard_logits": form, "name": f"{u}x{r}-of-{ranks}-{key}-head-by-{form}"}
        for u, r in ((1, 1), (2, 1), (1, 2), (2, 2)) if ranks > 1 and ranks % (u * r) == 0
        for form in ("tokens", "vocabulary")
        for key in ("sparse", "none", "float32", "per-sequence", "remembering", "blocks", "blocks-paced")
        if ranks < 8 or key == "sparse"
    ]  # fmt: skip


DRAFTS: dict[str, Cell] = {
    "eagle3": {},
    "peagle": {"algorithm": "peagle", "steps": {"depths": 3, "depth_ratio": 1.0}, "options": {"num_layers": 2}},
    "dflash": {"algorithm": "dflash", "steps": {"block_size": 3}, "options": {"num_layers": 2}},
    "latent": {"options": LATENT},
}


def bytes_cells(ranks: int) -> list[Cell]:
    """Of float64, with as many key heads as ranks and with fewer; of drafts of several layers the two-rank ones."""
    return [
        {"kind": "bytes", "dtype": "float64", "kv_heads": kv_heads, "ulysses": u, "ring": r, "exchange": exchange,
         "name": f"bytes-{u}x{r}-{exchange}-{kv_heads}-{draft}", **DRAFTS[draft]}
        for u, r in SHAPES if u * r == ranks > 1 for exchange in exchanges(u, r) for kv_heads in (1, 4)
        for draft in (DRAFTS if ranks == 2 else ("eagle3",))
    ]  # fmt: skip


def gather_cells(ranks: int) -> list[Cell]:
    return [
        {"kind": "gather", "ulysses": u, "ring": r, "length": length, "name": f"gather-{u}x{r}-{length}"}
        for u, r in SHAPES
        if u * r == ranks > 1
        for length in (3, 22)
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By cell; `reference-<problem>` are one process's, unpacked."""
    directory = tmp_path_factory.mktemp("sequence")
    found: Results = {}
    for ranks in (1, 2, 4, 8):
        chosen = cells(ranks)
        if ranks == 1:
            chosen += [reference(key) for key in PROBLEMS]
            exact = {**PROBLEMS["bfloat16"], "dtype": "float64"}
            chosen += [{**exact, "name": "reference-bfloat16-exact"}]
            chosen += [{**PROBLEMS["remembering"], "name": "reference-remembering-first", "windows": 1}]
        chosen += [*bytes_cells(ranks), *gather_cells(ranks)]
        here = directory / str(ranks)
        here.mkdir()
        (here / "cells.json").write_text(json.dumps(chosen))
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        command = [sys.executable, str(WORKER), str(here / "cells.json"), str(here), str(ranks), str(store.port)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        errors = "\n".join(path.read_text() for path in sorted(here.glob("*.error")))
        assert ran.returncode == 0, errors or ran.stderr
        found |= {path.stem: load_file(path) for path in here.glob("*.safetensors")}
    return found


def distance(got: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> dict[str, float]:
    """Relative 2-norm difference of each tensor."""
    assert got.keys() == expected.keys()
    return {
        name: float((got[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-300))
        for name, value in expected.items()
        if name.startswith(prefix) and value.any()
    }


EVERY = [cell for ranks in (1, 2, 4, 8) for cell in cells(ranks)]


@pytest.mark.parametrize("cell", [c for c in EVERY if c["dtype"] in LIMITS], ids=lambda cell: cell["name"])
def test_loss_metrics_and_every_gradient_are_one_processes(results: Results, cell: Cell) -> None:
    got, expected = results[cell["name"]], results[f"reference-{cell['problem']}"]
    for prefix in ("grad.", "sum.", "tokens"):
        apart = distance(got, expected, prefix)
        worst = max(apart, key=apart.__getitem__, default=None)
        assert worst is None or apart[worst] <= LIMITS[cell["dtype"]], (worst, apart[worst])
    for name, value in expected.items():
        if not value.any():
            assert not got[name].any(), name
    if cell["problem"] != "none":
        assert all(value.any() for name, value in expected.items() if name.startswith("grad."))


def test_the_window_before_decides(results: Results) -> None:
    """Without one the same objective has another loss and other gradients."""
    first, second = results["reference-remembering-first"], results["reference-remembering"]
    for name in ("sum.sums/alpha", "sum.sums/supervised", "sum.sums/cross_entropy"):
        assert torch.equal(first[name], second[name])
    apart = distance(second, first, "grad.") | distance(second, first, "sum.numerator")
    assert min(apart.values()) > 1e-2


@pytest.mark.parametrize("cell", [c for c in EVERY if c["dtype"] == "bfloat16"], ids=lambda cell: cell["name"])
def test_bfloat16_errs_no_more_than_one_process_does(results: Results, cell: Cell) -> None:
    """Over all gradients together; a single small one may be lucky in one process."""
    exact = results["reference-bfloat16-exact"]

    def error(found: dict[str, Tensor]) -> float:
        apart = distance(found, exact, "grad.")
        return (sum(value**2 for value in apart.values()) / len(apart)) ** 0.5

    assert 0 < error(results[cell["name"]]) <= 1.5 * error(results["reference-bfloat16"])


@pytest.mark.parametrize("cell", [*bytes_cells(2), *bytes_cells(4)], ids=lambda cell: cell["name"])
def test_a_step_sends_what_the_formula_says(results: Results, cell: Cell) -> None:
    for rank in range(cell["ulysses"] * cell["ring"]):
        found = results[f"{cell['name']}-{rank}"]
        if cell.get("algorithm") == "dflash":  # not every position is an anchor
            assert 0.9 * int(found["formula"]) <= int(found["sent"]) <= int(found["formula"])
        else:
            assert int(found["sent"]) == int(found["formula"]) > 0
        assert int(found["kept"]) == int(found["kept by formula"])
        assert (int(found["kept"]) > 0) == (cell["exchange"] == "gather" or cell["ulysses"] > 1)


@pytest.mark.parametrize("cell", [*gather_cells(2), *gather_cells(4)], ids=lambda cell: cell["name"])
def test_a_sequence_is_gathered_without_its_padding_and_gradients_come_home(results: Results, cell: Cell) -> None:
    ranks, length = cell["ulysses"] * cell["ring"], cell["length"]
    whole = torch.arange(2.0 * length, dtype=torch.float64).view(2, -1)
    for rank in range(ranks):
        found = results[f"{cell['name']}-{rank}"]
        assert torch.equal(found["gathered"], whole)
        positions = found["positions"]
        real = positions < length
        # Every rank's weights, summed: (1 + 2 + ... + ranks) (x + 1).
        expected = (whole[:, positions[real]] + 1) * (ranks * (ranks + 1) / 2)
        assert torch.equal(found["grad"][:, real], expected)
        assert not found["grad"][:, ~real].any()
