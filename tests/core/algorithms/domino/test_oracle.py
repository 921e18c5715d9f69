"""The training forward of Domino against its definition, recomputed token by token in float64 (2605.29707).

A block's states come from the oracle of blocks; the GRU, the correction and the mixed loss are written out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.interfaces.algorithm import Moment


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def corrections(
    params: dict[str, Tensor], embedding_VH: Tensor, hidden: list[Tensor], before: list[int]
) -> list[Tensor]:
    """What is added to the logits of every step of one block."""
    into, within = params["prefix_gru.weight_ih_l0"], params["prefix_gru.weight_hh_l0"]
    first, last = params["embed_proj.0.weight"], params["embed_proj.2.weight"]
    width = within.shape[1]
    state, found = torch.zeros(width).double(), []
    for h, token in zip(hidden, before, strict=True):
        e = embedding_VH[token]
        r = sigmoid(into[:width] @ e + within[:width] @ state)
        z = sigmoid(into[width : 2 * width] @ e + within[width : 2 * width] @ state)
        n = (into[2 * width :] @ e + r * (within[2 * width :] @ state)).tanh()
        state = (1 - z) * n + z * state
        inner = first @ torch.cat((h, state))
        added = last @ (inner * sigmoid(inner))
        found.append(added if found else torch.zeros_like(added))
    return found


ALWAYS = {"layer_types": ("full", "full"), "block_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "uncorrected": {"progress": 0.0, "share": 1.0},
    "mixed": {"progress": 0.125, "share": 0.75},
    "corrected": {"progress": 0.5, "share": 0.0},
    "other curriculum": {
        "progress": 0.5,
        "share": 0.3,
        "curriculum": {"start": 0.5, "end": 0.1, "until": 1.0},
        "objective": {"tv": 0.5, "ground_truth": 2.0},
    },
    "no curriculum": {"progress": 0.0, "share": 0.0, "curriculum": {"start": 0.0, "end": 0.0}},
    "per sequence": {"progress": 0.25, "share": 0.5, "normalisation": "per_sequence", "gamma": 1.5},
    "from the anchor": {"progress": 0.125, "share": 0.75, "sample_from_anchor": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_every_gradient_are_the_definitions(
    make_world: Callable[..., Any], oracle_of_blocks: Any, case: dict[str, Any]
) -> None:
    blocks, options = oracle_of_blocks, ALWAYS | case
    share, progress = options.pop("share"), options.pop("progress")
    world = make_world(draft_config=blocks.CONFIG, taps=(0, 3), mask_token=blocks.MASK, **options)
    given, rows = blocks.rows_of(world)
    moment = Moment(draws=(5, 4, 3, 2, 1), progress=progress)
    batch = world.batch(given, moment)
    result = world.algorithm.run(world.draft, world.head, batch, world.device, moment=moment)
    (result.numerator / result.denominator).backward()

    params = {name: p.detach().clone().requires_grad_() for name, p in world.draft.named_parameters()}
    size = 4
    skipped = 0 if options.get("sample_from_anchor") else 1
    steps = size - skipped
    # With the identity for a head the oracle of blocks says the states after the final norm.
    identity = torch.eye(world.algorithm.geometry.hidden_size).double()
    oracle = blocks.Oracle(
        params, world.head.embedding_VH, identity, identity, ("full", "full"), None, True, size, False
    )
    gamma = options.get("gamma", 7 * size / 16)
    objective = options.get("objective", {"ground_truth": 1.0})
    by_document: dict[int, list[Any]] = {}
    right, supervised = [0] * steps, [0] * steps
    for row in rows:
        for a in row.eligible():
            states = oracle.block(row, a)[skipped:]
            before = [row.x[a + s] if a + s < len(row.x) else 0 for s in range(steps)]
            added = corrections(params, world.head.embedding_VH, states, before)
            for s in range(steps):
                t = a + 1 + s
                if t >= len(row.x) or not row.m[t] or row.d[t] != row.d[a]:
                    continue
                full = (world.head.head_VH @ row.last[a + s]).softmax(-1)
                plain = world.head.head_VH @ states[s]
                total: Any = 0.0
                for part, logits in ((1 - share, plain + added[s]), (share, plain)):
                    logq = logits.log_softmax(-1)
                    cost = {"tv": 1 - torch.minimum(full, logq.exp()).sum(), "ground_truth": -logq[row.x[t]]}
                    total = total + part * sum(weight * cost[term] for term, weight in objective.items())
                weight = math.exp(-s / gamma)
                sums = by_document.setdefault(row.d[a], [0.0, 0.0])
                sums[0] = sums[0] + weight * total
                sums[1] += weight
                supervised[s] += 1
                right[s] += int((plain + added[s]).argmax()) == int(full.argmax())
    counted = list(by_document.values())
    if options.get("normalisation") == "per_sequence":
        loss = sum(over / under for over, under in counted) / len(counted)
    else:
        loss = sum(over for over, _ in counted) / sum(under for _, under in counted)
    loss.backward()

    assert float(result.numerator.detach() / result.denominator) == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, parameter in world.draft.named_parameters():
        want = params[name].grad
        want = torch.zeros_like(parameter) if want is None else want
        assert want.any() or (share == 1 and name.startswith(("prefix_gru", "embed_proj"))), name
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-12, msg=name)
    assert result.sums["supervised"].tolist() == supervised
    assert result.sums["correct"].tolist() == right, "metrics are those of the corrected logits"
    assert sum(supervised) > 20
    assert ("base_accuracy_per_position" in world.algorithm.summarise(result.sums)) == (share > 0)
