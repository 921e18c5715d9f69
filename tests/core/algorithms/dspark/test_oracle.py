"""The training forward of DSpark against its definition, recomputed token by token in float64 (2607.05147).

A block's states come from the oracle of blocks; what DSpark adds is written out here: the bias of each step from a
Python list of the tokens before it, the L1 distance over all V tokens, and the confidence's cross-entropy.
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


def biases(params: dict[str, Tensor], kind: str, hidden: list[Tensor], before: list[int]) -> list[Tensor]:
    """W2 f of every step of one block."""
    w1, w2 = params["markov_head.markov_w1.weight"], params["markov_head.markov_w2.weight"]
    found, state = [], torch.zeros_like(w1[0])
    for h, token in zip(hidden, before, strict=True):
        e = w1[token]
        feature = e
        if kind == "gated":
            w, b = params["markov_head.gate_proj.weight"], params["markov_head.gate_proj.bias"]
            feature = sigmoid(w @ torch.cat((h, e)) + b) * e
        if kind == "rnn":
            w, b = params["markov_head.joint_proj.weight"], params["markov_head.joint_proj.bias"]
            gate, candidate, output = (w @ torch.cat((state, e, h)) + b).split(len(e))
            state = sigmoid(gate) * state + (1 - sigmoid(gate)) * candidate.tanh()
            feature = output.tanh()
        found.append(w2 @ feature)
    return found


ALWAYS = {"layer_types": ("full", "full"), "block_size": 4}
CASES = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "rnn, confidence of the state alone": {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    "no confidence": {"confidence_weight": 0.0},
    "behind the anchor": {"sample_from_anchor": False, "confidence_weight": 0.3},
    "pruned, weight": {"pruned": True, "coverage": "weight"},
    "pruned, drop": {"pruned": True, "sample_from_anchor": False},
    "pruned, per sequence": {"pruned": True, "normalisation": "per_sequence", "confidence_weight": 0.7},
    "gamma, other weights": {"gamma": 1.5, "objective": {"tv": 0.5, "ground_truth": 2.0}},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_confidence_and_every_gradient_are_the_definitions(
    make_world: Callable[..., Any], oracle_of_blocks: Any, case: dict[str, Any]
) -> None:
    blocks, options = oracle_of_blocks, ALWAYS | case
    ids = blocks.IDS if options.pop("pruned", False) else list(range(300))
    world = make_world(
        draft_config=blocks.CONFIG, ids_N=torch.tensor(ids), taps=(0, 3), mask_token=blocks.MASK, **options
    )
    given, rows = blocks.rows_of(world)
    moment = Moment(draws=(5, 4, 3, 2, 1))
    batch = world.batch(given, moment)
    result = world.algorithm.run(world.draft, world.head, batch, world.device, moment=moment)
    (result.numerator / result.denominator).backward()

    params = {name: p.detach().clone().requires_grad_() for name, p in world.draft.named_parameters()}
    size, from_anchor = 4, options.get("sample_from_anchor", True)
    hidden_size = world.algorithm.geometry.hidden_size
    # With the identity for a head the oracle of blocks says the states after the final norm.
    oracle = blocks.Oracle(
        params,
        world.head.embedding_VH,
        torch.eye(hidden_size).double(),
        torch.eye(hidden_size).double(),
        ("full", "full"),
        None,
        True,
        size,
        from_anchor,
    )
    steps, gamma = size if from_anchor else size - 1, options.get("gamma", 4.0)
    objective = options.get("objective", {"l1": 0.9, "ground_truth": 0.1})
    kind, cover = options.get("markov_head_type", "vanilla"), options.get("coverage", "drop")
    trust = options.get("confidence_weight", 1.0)
    by_document: dict[int, list[Any]] = {}
    supervised, confidences, errors = [0] * steps, [0.0] * steps, [0.0] * steps
    for row in rows:
        for a in row.eligible():
            states = oracle.block(row, a)[size - steps :]
            before = [row.x[a + s] if a + s < len(row.x) else 0 for s in range(steps)]
            biased = biases(params, kind, states, before)
            for s in range(steps):
                t = a + 1 + s
                if t >= len(row.x) or not row.m[t] or row.d[t] != row.d[a]:
                    break  # behind the first unsupervised token nothing of the block is taught
                logq = (world.head.head_VH[ids] @ states[s] + biased[s]).log_softmax(-1)
                full = (world.head.head_VH @ row.last[a + s]).softmax(-1)
                q = torch.zeros(300).double().index_put((torch.tensor(ids),), logq.exp())
                alpha = torch.minimum(full, q).sum()
                cost = {
                    "l1": (q - full).abs().sum(),
                    "tv": 1 - alpha,
                    "ground_truth": -logq[ids.index(row.x[t])] if row.x[t] in ids else torch.zeros(()).double(),
                }
                share = {"drop": float(int(full.argmax()) in ids), "weight": float(full[ids].sum())}[cover]
                weight = math.exp(-s / gamma)
                sums = by_document.setdefault(row.d[a], [0.0, 0.0])
                sums[0] = sums[0] + weight * share * sum(part * cost[term] for term, part in objective.items())
                sums[1] += weight * share
                supervised[s] += 1
                if trust > 0:
                    read = [states[s]]
                    if options.get("confidence_head_with_markov", True):
                        read.append(params["markov_head.markov_w1.weight"][before[s]])
                    logit = params["confidence_head.proj.weight"][0] @ torch.cat(read)
                    c = sigmoid(logit + params["confidence_head.proj.bias"][0])
                    target = alpha.detach()
                    sums[0] = sums[0] - trust * weight * (target * c.log() + (1 - target) * (1 - c).log())
                    confidences[s] += float(c.detach())
                    errors[s] += abs(float(c.detach()) - float(target))
    counted = list(by_document.values())
    assert all(under > 0 for _, under in counted)
    if options.get("normalisation") == "per_sequence":
        loss = sum(over / under for over, under in counted) / len(counted)
    else:
        loss = sum(over for over, _ in counted) / sum(under for _, under in counted)
    loss.backward()

    assert float(result.numerator.detach() / result.denominator) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert params.keys() == {name for name, _ in world.draft.named_parameters()}
    for name, parameter in world.draft.named_parameters():
        want = params[name].grad
        assert want is not None
        assert want.any(), name
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-12, msg=name)
    assert result.sums["supervised"].tolist() == supervised
    assert sum(supervised) > 25
    if trust == 0:
        assert world.draft.confidence_head is None
        assert "confidence" not in result.sums
        return
    assert result.sums["confidence"].tolist() == pytest.approx(confidences, rel=1e-12)
    assert result.sums["confidence_error"].tolist() == pytest.approx(errors, rel=1e-12)
    figures = world.algorithm.summarise(result.sums)
    assert figures["confidence_error"] == pytest.approx(sum(errors) / sum(supervised), rel=1e-12)
    mean = [total / count for total, count in zip(confidences, supervised, strict=True)]
    assert figures["confidence_per_position"] == pytest.approx(mean, rel=1e-12)
