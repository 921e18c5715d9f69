"""The kernels that SGLang's CPU engine calls on processors without AMX, in torch: those of drafting in chains.

Names, order of arguments and what is written in place are sgl_kernel's. Slots are places in the pool of keys and
values; `table` [requests, positions] holds the slot of each request's positions. Trees of drafts are not supported: a
chain of n - 1 drafted tokens behind the last confirmed one is verified, node j following node j - 1.

Shape letters: B requests, n nodes verified per request.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torchspec_absent import stand_in  # type: ignore[import-not-found]

from . import hashing as hashing  # registers an operator  # noqa: TID251
from . import named as named  # declares some  # noqa: TID251

__version__ = "0.0.0"
_MASK_AMONG_NODES = 1  # SGLang's TreeMaskMode.QLEN_ONLY


def assign_req_to_token_pool_cpu(
    rows_B: Tensor, table: Tensor, start_B: Tensor, end_B: Tensor, slots: Tensor, _width: int
) -> None:
    """Positions start to end of each request get the next slots."""
    for row, start, end, part in _parts(rows_B, start_B, end_B):
        table[row, start:end] = slots[part].to(table.dtype)


def assign_extend_cache_locs_cpu(
    rows_B: Tensor, table: Tensor, start_B: Tensor, end_B: Tensor, slots: Tensor, _width: int
) -> None:
    """The slots of positions start to end of each request, one request after another."""
    for row, start, end, part in _parts(rows_B, start_B, end_B):
        slots[part] = table[row, start:end].to(slots.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    rows_B: Tensor, table: Tensor, lengths_B: Tensor, slots: Tensor, width: int, topk: int, steps: int
) -> None:
    """The slots of each request's next topk x steps positions."""
    assign_extend_cache_locs_cpu(rows_B, table, lengths_B, lengths_B + topk * steps, slots, width)


def _parts(rows_B: Tensor, start_B: Tensor, end_B: Tensor) -> list[tuple[int, int, int, slice]]:
    found, offset = [], 0
    for row, start, end in zip(rows_B.tolist(), start_B.tolist(), end_B.tolist(), strict=True):
        found.append((row, start, end, slice(offset, offset + end - start)))
        offset += end - start
    return found


def fill_bonus_tokens_cpu(tokens: Tensor, lengths_B: Tensor, bonus_B: Tensor, stride: int) -> None:
    """The last of each request's `lengths` accepted tokens; a request's tokens begin every `stride`."""
    last_B = torch.arange(len(lengths_B)) * stride + lengths_B.long() - 1
    bonus_B.copy_(tokens.reshape(-1)[last_B].view_as(bonus_B))


def fill_accept_out_cache_loc_cpu(accepted: Tensor, slots: Tensor, out: Tensor) -> None:
    """The slots of accepted nodes, packed to the front; a node of -1 is none."""
    kept = accepted.reshape(-1)
    kept = kept[kept >= 0].long()
    out[: len(kept)] = slots[kept].to(out.dtype)


def copy_all_layer_kv_cache_cpu(bases: Tensor, row_bytes: Tensor, target: Tensor, source: Tensor) -> None:
    """Copy rows between slots in every layer's buffer, given by its address; all are read before any is written."""
    for base, size in zip(bases.tolist(), row_bytes.tolist(), strict=True):
        rows = [ctypes.string_at(base + slot * size, size) for slot in source.tolist()]
        for slot, row in zip(target.tolist(), rows, strict=True):
            ctypes.memmove(base + slot * size, row, size)


def build_tree_kernel_efficient_cpu(
    _parents: Tensor,
    _selected: Tensor,
    lengths_B: Tensor,
    mask: Tensor,
    positions: Tensor,
    index_Bn: Tensor,
    next_Bn: Tensor,
    sibling_Bn: Tensor,
    topk: int,
    _depth: int,
    n: int,
    mask_mode: int,
) -> None:
    """The chain as a tree: node indices over the batch, each node's child and sibling (-1: none), who sees whom."""
    if topk != 1 or int(mask_mode) != _MASK_AMONG_NODES:
        raise RuntimeError("SGLang on a CPU without AMX verifies chains alone: speculative_eagle_topk must be 1")
    requests, node_n = len(lengths_B), torch.arange(n)
    positions.view(requests, n).copy_(lengths_B[:, None] + node_n)
    index_Bn.view(requests, n).copy_(torch.arange(requests * n).view(requests, n))
    next_Bn.view(requests, n).copy_(torch.where(node_n < n - 1, node_n + 1, -1).expand(requests, n))
    sibling_Bn.fill_(-1)
    mask.view(requests, n, n).copy_(torch.ones(n, n).tril().bool().expand(requests, n, n))


def verify_tree_greedy_cpu(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """How much of each chain is the target's own greedy choice.

    accept_index      the confirmed node, then the accepted ones; -1 behind them
    accept_token_num  accepted ones
    predicts          at accept_index: the target's choice after that node
    """
    B, n = candidates.shape
    choice_Bn = target_predict.view(B, n)
    agrees_Bn = candidates[:, 1:] == choice_Bn[:, :-1]
    accepted_B = agrees_Bn.long().cumprod(1).sum(1)
    kept_Bn = torch.arange(n) <= accepted_B[:, None]
    accept_index.copy_(torch.where(kept_Bn, retrive_index.view(B, n), -1)[:, : accept_index.shape[1]])
    accept_token_num.copy_(accepted_B)
    predicts[retrive_index.view(B, n)[kept_Bn].long()] = choice_Bn[kept_Bn].to(predicts.dtype)


stand_in(__name__)
