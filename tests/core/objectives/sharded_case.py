"""Micro-batches whose target's head is divided over ranks: whole, and each rank's part. Loaded by path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torchspec.core.interfaces.target import VocabularyMap, VocabularyShards
from torchspec.core.models.target_head import SafetensorsTargetHead, ShardedTargetHead
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.objectives.distillation import TERMS, PairTerms

V = 61  # no multiple of 2, 3 or 4
MIX = {"kl": 0.3, "cross_entropy": 0.2, "reverse_kl": 0.5, "jsd": 0.7, "tv": 0.4, "lk_alpha": 0.6, "argmax": 0.1,
       "ground_truth": 0.8}  # fmt: skip
VOCABULARIES = {"whole": range(V), "pruned": range(0, V, 3), "clustered": range(2, 14)}  # a part without draft's tokens
BOUNDS = {2: (0, 5, 17), 3: (0, 5, 5, 17), 4: (0, 9, 9, 10, 17)}
"""Whose the 17 rows are; some have none, one has one."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`silent`: the first rank's rows teach nothing. `documents`: every document counts alike. `saturated`: one token
    has all the probability, and draft and target disagree about it. `extras`: something is added to the logits.
    `each`: terms whose weights are each pair's own. `frozen`: the head wants no gradient. `is_part`: each rank is given
    its rows of it alone."""

    name: str
    form: str
    ids: str = "pruned"
    weights: Mapping[str, float | Tensor] = field(default_factory=lambda: {"cross_entropy": 1.0})
    coverage: str = "drop"
    dtype: torch.dtype = torch.float64
    vocabulary: int = V
    hidden: int = 8
    scale: float = 1.0
    rows: int = 17
    most_rows: int = 6
    survey: bool = False
    documents: bool = False
    silent: bool = False
    capped: bool = False
    saturated: bool = False
    watched: bool = False
    extras: bool = False
    each: Sequence[str] = ()
    frozen: bool = False
    is_part: bool = False


def cells() -> list[Cell]:
    made = []
    for form in ("tokens", "vocabulary"):
        for ids in VOCABULARIES:
            common: dict[str, Any] = {"form": form, "ids": ids}
            made.append(Cell(name=f"{form}-{ids}-cross-entropy", **common))
            for coverage in ("drop", "renormalise"):
                made.append(Cell(name=f"{form}-{ids}-{coverage}", weights=MIX, coverage=coverage, **common))
            for term in TERMS if ids == "pruned" else ():
                made.append(Cell(name=f"{form}-{term}", weights={term: 1.7}, coverage="weight", **common))
            mix: dict[str, Any] = {"weights": MIX, "coverage": "weight", **common}
            name = f"{form}-{ids}"
            made += [
                Cell(name=f"{name}-mix", **mix),
                Cell(name=f"{name}-other-chunks", most_rows=1 if ids == "pruned" else 100, **mix),
                Cell(name=f"{name}-documents", survey=True, documents=True, **mix),
                Cell(name=f"{name}-silent", silent=True, capped=True, **mix),
                Cell(name=f"{name}-nothing", rows=0, **mix),
                Cell(name=f"{name}-extras", extras=True, **mix),
                Cell(name=f"{name}-extras-nothing", extras=True, rows=0, **mix),
                Cell(name=f"{name}-each", each=("kl", "tv", "ground_truth"), silent=True, **mix),
                Cell(name=f"{name}-frozen", frozen=True, extras=True, each=("tv",), **mix),
                Cell(
                    name=f"{name}-saturated", saturated=True, dtype=torch.float32, scale=500.0,
                    **{**mix, "weights": {term: weight for term, weight in MIX.items() if term != "lk_alpha"}},
                ),
            ]  # fmt: skip
            if form == "vocabulary":
                part: dict[str, Any] = {"is_part": True, **mix}
                made += [
                    Cell(name=f"{name}-part", extras=True, silent=True, **part),
                    Cell(name=f"{name}-part-frozen", frozen=True, each=("kl",), **part),
                    Cell(name=f"{name}-part-nothing", rows=0, **part),
                ]
            if ids != "whole":  # whose survey reads nothing
                made += [
                    Cell(name=f"{name}-documents-drop", survey=True, documents=True, **{**mix, "coverage": "drop"}),
                    Cell(name=f"{name}-silent-surveyed", silent=True, survey=True, capped=True, **mix),
                    Cell(name=f"{name}-nothing-surveyed", rows=0, survey=True, **mix),
                ]
        for ids, survey in (("whole", False), ("pruned", False), ("pruned", True)):
            for dtype, rows in ((torch.float32, 40), (torch.bfloat16, 64)):
                short = str(dtype).removeprefix("torch.") + ("-surveyed" if survey else "")
                common = {
                    "form": form, "ids": ids, "coverage": "weight", "dtype": dtype, "vocabulary": 601, "hidden": 64,
                    "scale": 0.3, "rows": rows, "most_rows": 16, "survey": survey,
                }  # fmt: skip
                made.append(Cell(name=f"{form}-{ids}-{short}", weights=MIX, **common))
                made.append(Cell(name=f"{form}-{ids}-{short}-extras", weights=MIX, extras=True, each=("kl",), **common))
                if not survey:
                    made.append(Cell(name=f"{form}-{ids}-{short}-cross-entropy", **common))
    return made


def watched() -> list[Cell]:
    """Many rows in small chunks, for what the pass makes and sends."""
    return [
        Cell(
            name=f"{form}-{ids}-{dtype.itemsize}-watched", form=form, ids=ids, weights=MIX, coverage="weight",
            dtype=dtype, vocabulary=1201, rows=85, most_rows=6, survey=survey, watched=True,
        )
        for form in ("tokens", "vocabulary")
        for ids, dtype, survey in (
            ("whole", torch.float64, False), ("pruned", torch.bfloat16, False), ("pruned", torch.float32, True)
        )
    ]  # fmt: skip


def by_path(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bounds(cell: Cell, ranks: int) -> tuple[int, ...]:
    """Rank r has the rows bounds[r]..bounds[r + 1] - 1."""
    return tuple(edge * cell.rows // 17 for edge in BOUNDS[ranks])


def whole(cell: Cell, ranks: int) -> Any:
    """The union of all ranks' rows, with a head in one piece."""
    generator = torch.Generator().manual_seed(cell.vocabulary)
    rows_VH = cell.scale * torch.randn(cell.vocabulary, cell.hidden, generator=generator, dtype=torch.float64)
    rows_VH = rows_VH.to(cell.dtype)
    head = SafetensorsTargetHead(
        embedding_VH=rows_VH, head_VH=rows_VH, final_norm=nn.Identity(), **_scaling(cell)
    )  # fmt: skip
    ids = VOCABULARIES[cell.ids] if cell.vocabulary == V else range(0, cell.vocabulary, 1 if cell.ids == "whole" else 3)
    vocabulary = VocabularyMap(ids_N=torch.tensor(list(ids)), target_size=cell.vocabulary)
    scale = cell.scale if cell.saturated else 1.0
    case = by_path("distillation_case").Case.random(head, vocabulary, rows=cell.rows, steps=3, scale=scale)
    if cell.saturated:  # other slots' outputs
        case = replace(case, outputs=tuple(output_SH.roll(1, 0) for output_SH in case.outputs))
    case = replace(
        case, weights=cell.weights, coverage=cell.coverage, shard_logits=cell.form, frozen=cell.frozen
    )  # fmt: skip
    if cell.extras:
        case = case.with_extras()
    case = case.weighing_each(cell.each)
    if cell.silent:
        case = kept(case, case.row_M >= bounds(cell, ranks)[1])
    if cell.documents:
        owner_M = torch.bucketize(case.row_M, torch.tensor(bounds(cell, ranks)), right=True)
        case = replace(case, document_M=100 * owner_M + case.row_M // 4)
    return case


def kept(case: Any, keep_M: Tensor) -> Any:
    """The case with these pairs alone."""
    per_pair = ("slot_M", "row_M", "base_M", "truth_M", "document_M")
    values = {name: getattr(case, name)[keep_M] for name in per_pair if getattr(case, name) is not None}
    weights = {name: w[keep_M] if isinstance(w, Tensor) else w for name, w in case.weights.items()}
    sizes = tuple(int(part.sum()) for part in keep_M.split(list(case.sizes)))
    return replace(case, sizes=sizes, weights=weights, **values)


def owned(case: Any, cell: Cell, rank: int, ranks: int) -> Tensor:
    """Which pairs are this rank's."""
    start, stop = bounds(cell, ranks)[rank : rank + 2]
    return (case.row_M >= start) & (case.row_M < stop)


def part(case: Any, cell: Cell, shards: VocabularyShards) -> Any:
    """One rank's rows and pairs, and its part of the head."""
    start, stop = bounds(cell, shards.size)[shards.rank : shards.rank + 2]
    first, last = shards.bounds(shards.rank)
    target = ShardedTargetHead(
        embedding_VH=case.target.embedding_VH,
        shard_VH=case.target.head_VH[first:last].clone(),
        final_norm=nn.Identity(),
        shards=shards,
        weights=TargetWeights(path=Path(), files={}, stored={}),
        name="",
        **_scaling(cell),
    )
    mine = kept(case, owned(case, cell, shards.rank, shards.size))
    if cell.is_part:
        own_N = (case.vocabulary.ids_N >= first) & (case.vocabulary.ids_N < last)
        mine = replace(mine, head_NH=mine.head_NH[own_N], is_part=True)
    return replace(mine, target=target, normed_RH=case.normed_RH[start:stop], row_M=mine.row_M - start)


def _scaling(cell: Cell) -> dict[str, float]:
    return {"logit_factor": 1.5, "softcap": 4.0} if cell.capped else {}


def merged(cell: Cell, case: Any, parts: list[dict[str, Tensor]]) -> Any:
    """What all ranks found together: sums of losses and gradients, and each rank's pairs in their places."""
    distillation = by_path("distillation_case")
    ranks, terms = len(parts), {}
    for name in PairTerms.__dataclass_fields__:
        if name not in parts[0]:
            continue
        terms[name] = torch.empty(len(case.row_M), dtype=parts[0][name].dtype)
        for rank, found in enumerate(parts):
            terms[name][owned(case, cell, rank, ranks)] = found[name]

    def total(name: str) -> Tensor:
        return torch.stack([found[name].double() for found in parts]).sum(0)

    head = None
    if not cell.frozen:
        head = torch.cat([found["head"] for found in parts]) if cell.is_part else total("head")
    return distillation.Found(
        loss=total("loss"), terms=PairTerms(**terms), doutputs=tuple(total(f"outputs[{step}]") for step in range(3)),
        dnorm_H=total("norm"), dhead_NH=head,
        dextras=tuple(total(f"extras[{step}]") for step in range(3)) if cell.extras else (),
        dextra_NX=total("extra") if cell.extras else None,
    )  # fmt: skip
