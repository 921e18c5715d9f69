"""The kernels that stand in for SGLang's on a CPU without AMX, against their definitions; packages that are absent."""

from __future__ import annotations

import ctypes
import importlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import torchspec.backends.sglang.worker as worker

SHIMS = Path(worker.__file__).parent / "cpu_shims"


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    if importlib.util.find_spec("sgl_kernel") is not None:
        pytest.skip("the real sgl_kernel is installed here")
    finders, modules = list(sys.meta_path), set(sys.modules)
    sys.path.append(str(SHIMS))
    yield importlib.import_module("sgl_kernel")
    sys.path.remove(str(SHIMS))
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("sgl_kernel", "torchspec_absent"):
            del sys.modules[name]


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, of whole words."""
    word, h = 0xFFFFFFFF, 0
    for (k,) in struct.iter_unpack("<I", data):
        k = k * 0xCC9E2D51 & word
        k = (k << 15 | k >> 17) & word
        h ^= k * 0x1B873593 & word
        h = ((h << 13 | h >> 19) & word) * 5 + 0xE6546B64 & word
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & word
    h = (h ^ h >> 13) * 0xC2B2AE35 & word
    return h ^ h >> 16


def test_hash(kernels: ModuleType) -> None:
    assert murmur3(b"test") == 0xBA6BD213  # a published value of the function
    seeds, positions = [1, 2**62 + 12345, 2**63 - 1], [0, 5, 2**20]
    found = torch.ops.sgl_kernel.murmur_hash32_cpu.default(
        torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.arange(30)
    )
    assert found.dtype == torch.uint32
    expected = [
        [murmur3(struct.pack("<QII", seed, position, column)) for column in range(30)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("n", [2, 3, 6])
def test_verified_chains(kernels: Any, n: int) -> None:
    """Against walking each chain token by token, over few token ids so that any length is accepted somewhere."""
    generator, B = torch.Generator().manual_seed(n), 40
    candidates = torch.randint(0, 2, (B, n), generator=generator)
    target = torch.randint(0, 2, (B, n), generator=generator)
    index = torch.empty(B, n, dtype=torch.int64)
    child, sibling = torch.empty_like(index), torch.empty_like(index)
    mask, positions = torch.empty(B * n * n, dtype=torch.bool), torch.empty(B * n, dtype=torch.int64)
    lengths = torch.arange(B) + 3
    kernels.build_tree_kernel_efficient_cpu(None, None, lengths, mask, positions, index, child, sibling, 1, n - 1, n, 1)
    assert positions.view(B, n).tolist() == [[3 + b + j for j in range(n)] for b in range(B)]
    assert mask.view(B, n, n)[0].tolist() == [[j <= i for j in range(n)] for i in range(n)]
    assert child[0].tolist() == [*range(1, n), -1]
    predicts = torch.full((B * n,), -7, dtype=torch.int32)
    accepted, count = torch.empty(B, n, dtype=torch.int32), torch.empty(B, dtype=torch.int32)
    kernels.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=count,
        candidates=candidates,
        retrive_index=index,
        retrive_next_token=child,
        retrive_next_sibling=sibling,
        target_predict=target,
    )
    lengths_seen = set()
    for b in range(B):
        node, nodes = 0, [b * n]
        while node + 1 < n and candidates[b, node + 1] == target[b, node]:
            node += 1
            nodes.append(b * n + node)
        lengths_seen.add(node)
        assert int(count[b]) == node
        assert accepted[b].tolist() == nodes + [-1] * (n - len(nodes))
        assert [int(predicts[at]) for at in nodes] == target[b, : node + 1].tolist()
    assert lengths_seen == set(range(min(n, 4))) or n > 4
    with pytest.raises(RuntimeError, match="speculative_eagle_topk must be 1"):
        kernels.build_tree_kernel_efficient_cpu(None, None, lengths, mask, positions, index, child, sibling, 2, 1, n, 1)


def test_slots(kernels: Any) -> None:
    rows, start, end = torch.tensor([2, 0]), torch.tensor([1, 3]), torch.tensor([4, 5])
    table, slots = torch.zeros(3, 6, dtype=torch.int32), torch.arange(10, 15)
    kernels.assign_req_to_token_pool_cpu(rows, table, start, end, slots, 6)
    assert table.tolist() == [[0, 0, 0, 13, 14, 0], [0] * 6, [0, 10, 11, 12, 0, 0]]
    back = torch.zeros(5, dtype=torch.int64)
    kernels.assign_extend_cache_locs_cpu(rows, table, start, end, back, 6)
    assert back.tolist() == slots.tolist()
    ahead = torch.zeros(4, dtype=torch.int64)
    kernels.assign_draft_cache_locs_contiguous_cpu(rows, table, torch.tensor([1, 3]), ahead, 6, 1, 2)
    assert ahead.tolist() == [10, 11, 13, 14]


def test_accepted_tokens(kernels: Any) -> None:
    bonus = torch.zeros(2, dtype=torch.int64)
    kernels.fill_bonus_tokens_cpu(torch.arange(8).view(2, 4), torch.tensor([2, 4]), bonus, 4)
    assert bonus.tolist() == [1, 7]
    out = torch.full((6,), -1)
    kernels.fill_accept_out_cache_loc_cpu(torch.tensor([[0, 2, -1], [3, -1, -1]]), torch.arange(20, 26), out)
    assert out.tolist() == [20, 22, 23, -1, -1, -1]


def test_rows_of_keys_and_values_move_at_once(kernels: Any) -> None:
    """Where sources and targets overlap, too."""
    layers = [torch.arange(12.0).view(6, 2) + 100 * i for i in range(2)]
    before = [layer.clone() for layer in layers]
    addresses = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64)
    kernels.copy_all_layer_kv_cache_cpu(addresses, torch.tensor([8, 8]), torch.tensor([1, 2]), torch.tensor([0, 1]))
    for old, new in zip(before, layers, strict=True):
        assert torch.equal(new, old[[0, 0, 1, 3, 4, 5]])
    assert ctypes.sizeof(ctypes.c_float) * 2 == 8


def test_what_is_not_there_says_so_when_used(kernels: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"sgl_kernel is not installed here, and SGLang needs sgl_kernel.silu_and_mul"
    ):
        kernels.silu_and_mul(torch.zeros(1))
    deep = importlib.import_module("sgl_kernel.flash.deep")
    assert issubclass(type("Own", (deep.SomeBase,), {}), deep.SomeBase)
    assert deep.Interpolation.BILINEAR == "BILINEAR"
    assert not hasattr(kernels, "__wrapped__")


def test_operators_that_are_only_named_say_so_when_they_are_called(kernels: Any) -> None:
    for name in kernels.named.NAMES:
        with pytest.raises(NotImplementedError, match=name):
            getattr(torch.ops.sgl_kernel, name)(torch.zeros(2))
