"""What a trainer in somebody else's loop is brought: checked, copied, held within a budget and counted."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from torchspec.core.errors import SampleError, StoreFullError, TargetError


def test_everything_wrong_with_a_sample_is_said_at_once_and_nothing_is_kept(
    kept_policy: PreTrainedModel, online: ModuleType
) -> None:
    trainer = online.make(kept_policy)
    good = online.sample(kept_policy, trainer, 1)
    layers, length = trainer.required.tap_layers, len(good["tokens"])
    assert trainer.required.hf_hidden_states == tuple(layer + 1 for layer in layers)

    def said(**wrong: Any) -> str:
        with pytest.raises(SampleError) as caught:
            trainer.add(**{**good, **wrong})
        return str(caught.value)

    narrow = {layer: tensor[:, :-1] for layer, tensor in good["hidden_states"].items()}
    text = said(hidden_states=narrow, last=good["last"][:-1], loss_mask=good["loss_mask"][1:], norm_state="normed")
    assert f"hidden states of layer {layers[0]}: shape [{length}, 63], expected [{length}, 64]" in text
    assert f"last: shape [{length - 1}, 64]" in text
    assert f"loss_mask has shape [{length - 1}]" in text
    assert "norm_state is 'normed'" in text
    assert f"{layers[1]}, {layers[2]} of those" in said(hidden_states={layers[0]: good["last"]})
    stacked = torch.stack(list(good["hidden_states"].values()), dim=1)
    assert f"expected [T, {len(layers)}, 64]" in said(hidden_states=stacked[:, :1])
    broken = {layer: tensor.clone() for layer, tensor in good["hidden_states"].items()}
    broken[layers[2]][3, 5] = float("nan")
    assert f"hidden states of layer {layers[2]}: not finite" in said(hidden_states=broken)
    assert "last: not finite" in said(last=good["last"] * float("inf"))
    assert "tokens are from 0 to 300" in said(tokens=[0, 300, *([3] * (length - 2))])
    assert "whole numbers [T]" in said(tokens=good["tokens"][None])
    assert "other values than 0 and 1" in said(loss_mask=[2] * length)
    listed = {**good["hidden_states"], layers[1]: good["last"].tolist()}
    assert f"hidden states of layer {layers[1]}: list, expected a tensor" in said(hidden_states=listed)
    assert "last: NoneType, expected a tensor" in said(last=None)
    assert "last: on the meta device" in said(last=good["last"].to("meta"))
    assert "hidden_states is a list, expected tensors by layer" in said(hidden_states=[good["last"]] * len(layers))
    assert trainer.pending.samples == 0
    assert trainer.counts.received == 0
    trainer.add(**{**good, "hidden_states": stacked, "loss_mask": good["loss_mask"].int()})
    assert trainer.pending.samples == 1


def test_what_is_no_sample_at_all_is_refused_by_name(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    trainer = online.make(kept_policy)
    good = online.sample(kept_policy, trainer, 1)
    layer, length = trainer.required.tap_layers[0], len(good["tokens"])

    def said(**wrong: Any) -> str:
        with pytest.raises(SampleError) as caught:
            trainer.add(**{**good, **wrong})
        return str(caught.value)

    assert "sample 5 is not taken:\n  - name is 5, expected text" in said(name=5)
    for epoch in (-1, "x", 1.0, True, None):
        assert f"epoch is {epoch!r}, expected a whole number" in said(epoch=epoch)
    assert "tokens: on the meta device" in said(tokens=good["tokens"].to("meta"))
    both = said(loss_mask=good["loss_mask"].to("meta"), last=good["last"][:, :3])
    assert "loss_mask: on the meta device" in both
    assert f"last: shape [{length}, 3]" in both
    for tokens in (None, "text", [[1], [2, 3]]):
        assert f"tokens: {type(tokens).__name__}, expected numbers [T]" in said(tokens=tokens)
    assert "last: sparse_coo or nested, expected a dense" in said(last=good["last"].to_sparse())
    assert "last: float8_e4m3fn, expected floats of 16 bits" in said(last=good["last"].to(torch.float8_e4m3fn))
    ints = {**good["hidden_states"], layer: good["last"].int()}
    assert f"hidden states of layer {layer}: int32" in said(hidden_states=ints)
    assert "hidden_states: on the meta device" in said(hidden_states=torch.zeros(length, 3, 64, device="meta"))
    assert trainer.counts.received == 0


def test_a_part_of_a_tensor_is_no_tensor(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    """As a sharded policy has them; whether there is one rank or more."""
    trainer = online.make(kept_policy)
    good = online.sample(kept_policy, trainer, 1)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        shared = DTensor.from_local(good["last"], mesh, [Replicate()])
        with pytest.raises(SampleError, match=r"last: a DTensor, .* expected its .full_tensor\(\)"):
            trainer.add(**{**good, "last": shared})
        with pytest.raises(TargetError, match=r"head: a DTensor, .* expected its .full_tensor\(\)"):
            trainer.update_target(head=DTensor.from_local(kept_policy.lm_head.weight.detach(), mesh, [Replicate()]))
    finally:
        dist.destroy_process_group()


def test_an_evaluation_says_what_its_samples_lack(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    trainer = online.make(kept_policy)
    good = online.sample(kept_policy, trainer, 1)
    lacking = {name: value for name, value in good.items() if name not in ("last", "norm_state")}
    with pytest.raises(SampleError) as caught:
        trainer.evaluate([good, {**lacking, "lats": good["last"]}])
    text = str(caught.value)
    assert text.startswith(
        "sample '1' is not taken:\n  - last is missing\n  - norm_state is missing\n  - lats is not known"
    )
    for wrong in (3, [3], good, None, [good, None]):
        with pytest.raises(SampleError, match=r"expected a (list of the arguments|mapping with tokens, loss_mask)"):
            trainer.evaluate(wrong)
    with pytest.raises(SampleError, match="epoch is 'x'"):
        trainer.evaluate([{**good, "epoch": "x"}])
    assert trainer.evaluate(iter([good])) == trainer.evaluate([good])
    assert trainer.evaluate([]) == {"loss": None, "samples": 0}


def test_any_integers_and_any_precision_are_taken(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    """As if they had been brought in int64, and in the precision that they are rounded to."""
    given = online.sample(kept_policy, online.make(kept_policy), 4)
    given["tokens"] %= 128

    def trained(tokens: torch.dtype, states: torch.dtype, *, widened: bool) -> dict[str, Any]:
        trainer = online.make(kept_policy, train={"batch_size": 1})
        wide = torch.float32 if widened else states
        trainer.add(**{
            **given,
            "tokens": given["tokens"].to(tokens),
            "hidden_states": {layer: x.to(states).to(wide) for layer, x in given["hidden_states"].items()},
            "last": given["last"].to(states).to(wide),
        })  # fmt: skip
        return online.figures(trainer.step())  # type: ignore[no-any-return]

    plain = trained(torch.int64, torch.float32, widened=True)
    for tokens in (torch.uint8, torch.int8, torch.uint16, torch.int32, torch.uint64):
        assert trained(tokens, torch.float32, widened=True) == plain
    for states in (torch.bfloat16, torch.float16):
        half = trained(torch.int64, states, widened=False)
        assert half == trained(torch.int64, states, widened=True)
        assert half["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert trained(torch.int64, torch.float64, widened=False) == plain


def test_hidden_states_are_copied(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    """So the caller's buffers may be used again; by layer, in any order, or in one tensor."""
    plain, reused = online.make(kept_policy), online.make(kept_policy)
    for number in range(3):
        given = online.sample(kept_policy, plain, number)
        plain.add(**{**given, "hidden_states": dict(reversed(given["hidden_states"].items()))})
        mine = online.sample(kept_policy, reused, number)
        mine["hidden_states"] = torch.stack(list(mine["hidden_states"].values()), dim=1)
        reused.add(**mine)
        for name in ("hidden_states", "last", "tokens", "loss_mask"):
            mine[name].zero_()
    assert online.figures(plain.step()) == online.figures(reused.step())


def test_a_full_budget_refuses_or_drops_and_counts(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    trainer = online.make(kept_policy, hold={"budget_mb": 1})
    sizes = []
    for number in range(1000):
        before, given = trainer.pending.nbytes, online.sample(kept_policy, trainer, number)
        if before > 990_000:
            break
        trainer.add(**given)
        sizes.append(trainer.pending.nbytes - before)
    with pytest.raises(StoreFullError, match=r"call step\(\) first"):
        trainer.add(**given)
    held = trainer.pending
    assert (held.samples, held.nbytes) == (len(sizes), sum(sizes))
    assert held.nbytes <= held.budget == 1_000_000 < held.nbytes + max(sizes)
    assert trainer.step() is not None
    trainer.add(**online.sample(kept_policy, trainer, 0))
    counts = trainer.counts
    assert (counts.received, counts.trained, counts.dropped) == (len(sizes) + 1, 3, 0)

    drops = online.make(kept_policy, hold={"budget_mb": 1, "when_full": "drop_oldest"})
    for number in range(len(sizes) + 4):
        drops.add(**online.sample(kept_policy, drops, number))
        assert drops.pending.nbytes <= 1_000_000
    counts = drops.counts
    assert counts.dropped > 0
    assert counts.received == len(sizes) + 4 == counts.trained + counts.dropped + drops.pending.samples
    assert drops.clear() == drops.pending.samples + drops.counts.dropped - counts.dropped
    assert drops.counts.dropped == drops.counts.received


def test_windows_by_tokens(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    """Lengths are 10, 13, 16, 19, 22, 10, ...: as few samples, in order, as have 30 tokens."""
    trainer = online.make(kept_policy, train={"batch_tokens": 30, "micro_batch_size": 2})
    rows = online.losses(trainer, kept_policy, 6)
    assert [(row["samples"], row["tokens"]) for row in rows] == [(3, 39), (5, 80)]
    assert trainer.pending.tokens == 10


def test_a_window_without_supervision_is_counted_and_changes_nothing(
    kept_policy: PreTrainedModel, online: ModuleType
) -> None:
    trainer = online.make(kept_policy)
    before = dict(trainer.draft_weights())
    for number in range(3):
        given = online.sample(kept_policy, trainer, number)
        trainer.add(**{**given, "loss_mask": torch.zeros_like(given["loss_mask"])})
    row = online.figures(trainer.step())
    assert (row["loss"], row["lr"], row["empty_windows"], row["samples"]) == (None, None, 1, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.draft_weights())


def test_names_and_epochs_decide_what_is_drawn(kept_policy: PreTrainedModel, online: ModuleType) -> None:
    def loss(**more: Any) -> Tensor:
        trainer = online.make(kept_policy, "dflash", train={"batch_size": 1})
        trainer.add(**{**online.sample(kept_policy, trainer, 4), **more})
        return online.figures(trainer.step())["loss"]  # type: ignore[no-any-return]

    assert loss() == loss()
    assert len({loss(), loss(epoch=1), loss(name="other")}) == 3
