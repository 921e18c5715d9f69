"""Which (slot, step) pairs learn from what, and that nothing about batching changes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.algorithms.eagle3.batch import OwnRows, Plan, build_batch, running_slots
from torchspec.core.features.rows import FeatureRows, TokenRows
from torchspec.core.interfaces.algorithm import StepResult
from torchspec.core.interfaces.features import Features
from torchspec.core.parallel.shards import Layout

Worlds = Callable[..., Any]
DEVICE = torch.device("cpu")


def rows_of(*cases: tuple[list[int], list[int]]) -> TokenRows:
    """Each row given as (mask, document)."""
    pad = torch.nn.utils.rnn.pad_sequence
    return TokenRows(
        input_ids_BT=pad([torch.arange(len(mask)) for mask, _ in cases], batch_first=True),
        loss_mask_BT=pad([torch.tensor(mask, dtype=torch.bool) for mask, _ in cases], batch_first=True),
        document_BT=pad([torch.tensor(doc) for _, doc in cases], batch_first=True, padding_value=-1),
    )


def supervised(rows: TokenRows, steps: int) -> set[tuple[int, int, int]]:
    own = OwnRows.of(rows, Layout(length=rows.length), 0, steps)
    return {tuple(place) for place in own.supervised_BSK().nonzero().tolist()}


def test_the_mask_belongs_to_the_predicted_token() -> None:
    # Tokens 3, 4, 5 are the assistant's; token 6 is the newline after its end of turn.
    rows = rows_of(([0, 0, 0, 1, 1, 1, 0], [0] * 7))
    assert supervised(rows, 1) == {(0, 1, 0), (0, 2, 0), (0, 3, 0)}
    assert supervised(rows, 3) == {(0, i, k) for i in range(7) for k in range(3) if i + 2 + k in (3, 4, 5)}


def test_no_teacher_row_lies_behind_the_end() -> None:
    """The last real token is predicted by nothing beyond it: rows of different lengths, everything supervised."""
    rows = rows_of(([1] * 5, [0] * 5), ([1] * 9, [1] * 9))
    assert supervised(rows, 4) == {
        (b, i, k) for b, length in ((0, 5), (1, 9)) for i in range(9) for k in range(4) if i + 2 + k <= length - 1
    }


def test_supervision_stays_within_a_document() -> None:
    rows = rows_of(([1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]))
    assert supervised(rows, 2) == {(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 4, 0), (0, 5, 0), (0, 4, 1)}
    assert rows.starts_BT.tolist() == [[0, 0, 0, 0, 4, 4, 4, 4]]


def test_rotary_positions_restart_with_each_document(make_world: Worlds) -> None:
    """Attention sees only their differences, so no loss would tell; a cache of served keys would."""
    world = make_world(unroll=2)
    rows = rows_of(([1] * 7, [0, 0, 0, 1, 1, 2, 2]))
    feature = world.features(rows.input_ids_BT[0])
    inputs = world.assembled(rows, [feature]).inputs
    assert inputs.angles_A[inputs.turn_BS].tolist() == [[0, 1, 2, 0, 1, 0, 1]]


def test_pairs_are_taught_by_the_row_before_the_predicted_token(make_world: Worlds) -> None:
    world = make_world(unroll=3)
    lengths = (9, 6, 12)
    features = [world.features(world.tokens(n, n), n) for n in lengths]
    masks = [torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.6 for n in lengths]
    batch = build_batch(FeatureRows.of(features, masks), Plan(steps=3, chunk_rows=4, device=DEVICE))
    queries, longest = batch.inputs.slots.index_BQ.shape[1], max(lengths)
    seen = []
    bounds = [0, *torch.tensor(batch.pairs.sizes).cumsum(0).tolist()]
    for k in range(3):
        for m in range(bounds[k], bounds[k + 1]):
            b, q = divmod(int(batch.pairs.slot_M[m]), queries)
            i = int(batch.inputs.slots.index_BQ[b, q])
            assert divmod(int(batch.pairs.cell_M[m]), 3) == (b * longest + i, k)
            r = int(batch.pairs.row_M[m])
            assert int(batch.pairs.place_R[r]) == b * longest + i + 1 + k
            assert torch.equal(batch.last_RH[r], features[b].last_TH[i + 1 + k])
            assert int(batch.pairs.document_M[m]) == b
            seen.append((b, i, k))
    assert set(seen) == {
        (b, i, k)
        for b, n in enumerate(lengths)
        for i in range(n)
        for k in range(3)
        if i + 2 + k < n and masks[b][i + 2 + k]
    }
    assert len(seen) == len(set(seen))
    chunked = sorted(m for chunk in batch.chunks for lo, hi in chunk.pairs for m in range(lo, hi))
    assert chunked == list(range(len(seen)))
    for chunk in batch.chunks:
        for lo, hi in chunk.pairs:
            assert all(chunk.start <= r < chunk.stop for r in batch.pairs.row_M[lo:hi].tolist())


def gradients(world: Any, results: list[StepResult]) -> dict[str, Tensor]:
    """Of the sums of several micro-batches, divided once."""
    world.draft.zero_grad(set_to_none=True)
    numerator = sum((r.numerator for r in results), torch.zeros(()))
    (numerator / sum(float(r.denominator) for r in results)).backward()
    return {name: p.grad.clone() for name, p in world.draft.named_parameters()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


@pytest.mark.parametrize(
    "options", [{}, {"normalisation": "per_sequence"}, {"fc_norm": True}], ids=["token", "per_sequence", "eagle3.1"]
)
def test_gradients_do_not_depend_on_how_samples_are_batched(make_world: Worlds, options: dict[str, Any]) -> None:
    world = make_world(unroll=3, ids_N=torch.arange(0, 300, 2), **options)
    lengths = (30, 8, 19, 3)
    features = [world.features(world.tokens(n, n), n) for n in lengths]
    masks = [torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5 for n in lengths]

    def step(chosen: list[int]) -> StepResult:
        return world.step([features[n] for n in chosen], [masks[n] for n in chosen])

    together = [step([0, 1, 2, 3])]
    apart = [step([2]), step([3, 1]), step([0])]
    assert_same(gradients(world, apart), gradients(world, together))
    added = {name: sum(r.sums[name] for r in apart) for name in together[0].sums}
    whole, parts = world.algorithm.summarise(together[0].sums), world.algorithm.summarise(added)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("options", [{}, {"fc_norm": True}], ids=["eagle3", "eagle3.1"])
def test_padding_changes_nothing(make_world: Worlds, options: dict[str, Any]) -> None:
    """Rubbish behind a row's end, as a longer neighbour makes room for it, is never looked at."""
    world = make_world(unroll=3, **options)
    feature = world.features(world.tokens(12, 1), 1)
    mask_T = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    alone = [world.step([feature], [mask_T])]
    longer = replace(
        feature,
        input_ids_T=torch.cat((feature.input_ids_T, world.tokens(5, 2))),
        taps_TNH=torch.cat((feature.taps_TNH, torch.full_like(feature.taps_TNH[:5], 1e4))),
        last_TH=torch.cat((feature.last_TH, torch.full_like(feature.last_TH[:5], 1e4))),
    )
    rows = TokenRows(
        input_ids_BT=longer.input_ids_T[None],
        loss_mask_BT=torch.cat((mask_T, torch.ones(5, dtype=torch.bool)))[None],
        document_BT=torch.tensor([[0] * 12 + [-1] * 5]),
    )
    batch = world.assembled(rows, [longer])
    assert_same(
        gradients(world, [world.algorithm.run(world.draft, world.head, batch, world.device)]), gradients(world, alone)
    )


@pytest.mark.parametrize("ids", [None, torch.arange(0, 300, 7)])
@pytest.mark.parametrize("lengths", [(1,), (2, 1), (9, 4)])
def test_without_supervision_every_gradient_is_a_finite_zero(
    make_world: Worlds, lengths: tuple[int, ...], ids: Tensor | None
) -> None:
    world = make_world(dtype=torch.float32, ids_N=ids, unroll=3, draft_config={"hidden_size": 32})
    features = [world.features(world.tokens(n, n), n) for n in lengths]
    masks = [torch.zeros(n, dtype=torch.bool) for n in lengths]
    result = world.step(features, masks)
    assert float(result.denominator) == 0.0
    assert result.numerator.item() == 0.0
    result.numerator.backward()
    for name, parameter in world.draft.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    figures = world.algorithm.summarise(result.sums)
    assert math.isnan(figures["simulated_acceptance_length"])  # no round, no length
    assert math.isnan(figures["joint_prefix_length"])
    assert figures["loss"] == 0.0


def test_samples_too_short_to_predict_anything_add_nothing(make_world: Worlds) -> None:
    world = make_world(unroll=4)
    ones = {n: torch.ones(n, dtype=torch.bool) for n in (1, 2, 20)}
    features = {n: world.features(world.tokens(n, n), n) for n in ones}

    def step(*lengths: int) -> StepResult:
        return world.step([features[n] for n in lengths], [ones[n] for n in lengths])

    assert_same(gradients(world, [step(1, 20, 2)]), gradients(world, [step(20)]))


def test_the_final_norm_is_applied_exactly_once(make_world: Worlds) -> None:
    """States before the norm, and the same states after it, teach the same."""
    world = make_world(unroll=2)
    before: Features = world.features(world.tokens(14, 1), 1, "pre_norm")
    after = replace(before, last_TH=world.head.normed(before.last_TH, "pre_norm"), norm_state="post_norm")
    mask_T = torch.ones(14, dtype=torch.bool)
    losses = [
        world.step([f], [mask_T]).numerator.item() for f in (before, after, replace(before, norm_state="post_norm"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the target's norm computes in fp32
    assert abs(losses[2] - losses[0]) > 1e-4 * losses[0]


def test_training_in_eval_mode_makes_no_graph(make_world: Worlds) -> None:
    world = make_world(unroll=2)
    feature = world.features(world.tokens(14, 1), 1)
    with torch.no_grad():
        result = world.step([feature], [torch.ones(14, dtype=torch.bool)])
    assert not result.numerator.requires_grad
    assert float(result.numerator) > 0


def test_peers_run_as_many_slots_as_the_one_with_most() -> None:
    """They exchange queries, so all send the same number; nobody's slots are lost."""
    few, many = torch.zeros(2, 10, 3, dtype=torch.bool), torch.zeros(2, 10, 3, dtype=torch.bool)
    few[0, 4, 1] = True
    many[:, 2:7, 0] = True
    many[1, 9, 2] = True
    for peers in ((few, many), (many, few), (few, few)):
        found = running_slots(peers)
        counts = {slots.index_BQ.shape[1] for slots, _ in found}
        assert counts == {max(int(peer.any(-1).sum(-1).max()) for peer in peers)}
        for peer, (slots, rank_BS) in zip(peers, found, strict=True):
            for row, slot in peer.any(-1).nonzero().tolist():
                assert int(slots.index_BQ[row, rank_BS[row, slot]]) == slot
