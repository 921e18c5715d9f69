"""Log-probabilities over a vocabulary that real ranks share in unequal parts, against the definition in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from torchspec.core import registry
from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.objectives import hidden_log_probabilities, token_log_probabilities

HERE = Path(__file__).parent
RANKS = (1, 2, 3)
OUTPUTS = ("log_probability", "entropy")


@pytest.fixture(scope="module")
def all_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, str(HERE / "log_probability_worker.py"), str(directory)], check=True)
    return directory


@pytest.fixture(params=RANKS, ids=lambda ranks: f"{ranks}-ranks")
def results(request: pytest.FixtureRequest, all_results: Path) -> Path:
    return all_results / str(request.param)


def found(results: Path, policies: ModuleType) -> Iterator[tuple[Any, list[dict[str, Tensor]]]]:
    """(cell, what each rank found)."""
    stored = [load_file(path) for path in sorted(results.glob("*.safetensors"))]
    assert len(stored) == int(results.name)
    for cell in policies.cells():
        prefix = f"{cell.name}/"
        yield (
            cell,
            [{name.removeprefix(prefix): x for name, x in rank.items() if name.startswith(prefix)} for rank in stored],
        )


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs and the gradient of hidden are the first rank's, the others are put together."""
    whole = {name: parts[0][name] for name in (*OUTPUTS, "hidden") if name in parts[0]}
    joined = {name: torch.cat([part[name] for part in parts], dim) for name, dim in
              (("logits", 1), ("weight", 0), ("bias", 0)) if name in parts[0]}  # fmt: skip
    return whole | joined


def test_values_and_gradients(policies: ModuleType, results: Path) -> None:
    for cell, parts in found(results, policies):
        if cell.dtype != torch.bfloat16:
            policies.compare(
                merged(parts), policies.Case.random(cell).defined(), policies.TOLERANCE[cell.dtype], cell.name
            )


def test_bfloat16(policies: ModuleType, results: Path) -> None:
    for cell, parts in found(results, policies):
        if cell.dtype == torch.bfloat16:
            policies.compare_rounded(policies.Case.random(cell), merged(parts), cell.name)


def test_all_ranks_have_the_same_outputs_and_the_same_gradient_of_hidden(policies: ModuleType, results: Path) -> None:
    for cell, parts in found(results, policies):
        for part in parts[1:]:
            for name in (*OUTPUTS, "hidden"):
                assert (name in part) == (name in parts[0])
                if name in part:
                    assert torch.equal(part[name], parts[0][name]), (cell.name, name)


def test_what_is_exchanged(policies: ModuleType, results: Path) -> None:
    """Forward, one gather of 3 numbers a token that counts, or 4; backward, the sum of hidden's gradient once a chunk
    of 128 tokens or more, in fp32 or wider. One rank exchanges nothing."""
    ranks = int(results.name)
    for rank in range(ranks):
        given = json.loads((results / f"{rank}.json").read_text())
        for cell in policies.cells():
            counted = int((policies.Case.random(cell).tokens_N != policies.IGNORED).sum())
            wide = "torch.float64" if cell.dtype == torch.float64 else "torch.float32"
            want = []
            if ranks > 1 and counted:
                want = [["all_gather", [(4 if cell.entropy else 3) * counted], wide]]
                if cell.form == "hidden" and "hidden" not in cell.frozen:
                    chunks = counted // 128 if cell.budget else 1
                    sizes = [counted * (i + 1) // chunks - counted * i // chunks for i in range(chunks)]
                    assert min(sizes) >= 128 or chunks == 1
                    want += [["all_reduce", [size, policies.H], wide] for size in sizes]
            assert given[cell.name] == want, cell.name


@pytest.fixture
def alone() -> Iterator[VocabularyShards]:
    """A group of one rank, with five tokens."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield VocabularyShards(
        group=group, communication=registry.load_device("cpu").communication, target_size=5, sizes=(5,)
    )  # fmt: skip
    dist.destroy_process_group()


def test_parts_that_are_not_what_the_shards_say(alone: VocabularyShards) -> None:
    tokens_N, message = torch.zeros(4).long(), "rank 0 has 6 tokens of the vocabulary, the shards say 5"
    with pytest.raises(ValueError, match=message):
        token_log_probabilities(torch.zeros(4, 6), tokens_N, FusedOps(), shards=alone)
    with pytest.raises(ValueError, match=message):
        hidden_log_probabilities(torch.zeros(4, 2), torch.zeros(6, 2), tokens_N, FusedOps(), shards=alone)


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (6,), ()])
def test_sizes_that_do_not_divide_the_vocabulary(alone: VocabularyShards, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not divide 5 rows over 1 ranks"):
        VocabularyShards(group=alone.group, communication=alone.communication, target_size=5, sizes=sizes)
