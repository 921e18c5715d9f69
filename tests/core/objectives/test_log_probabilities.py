"""Log-probabilities and entropies in one process, against their definition in float64."""

from __future__ import annotations

import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.objectives import hidden_log_probabilities, token_log_probabilities

FORMS = ("logits", "hidden")
DTYPES = (torch.float64, torch.float32)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["entropy", "no-entropy"])
def entropy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def check(policies: ModuleType, case: Any, tolerance: float) -> None:
    policies.compare(case.ours(), case.defined(), tolerance, case.cell.name)


def test_every_cell_of_the_ranks(policies: ModuleType) -> None:
    """Bias, masked logits, ignored tokens, none at all, chunks, frozen leaves."""
    for cell in policies.cells():
        if cell.dtype != torch.bfloat16:
            check(policies, policies.Case.random(cell), policies.TOLERANCE[cell.dtype])


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(
    policies: ModuleType, form: str, entropy: bool, temperature: float, dtype: torch.dtype
) -> None:
    cell = policies.Cell(name="", form=form, entropy=entropy, temperature=temperature, dtype=dtype, bias=True)
    check(policies, policies.Case.random(cell), policies.TOLERANCE[dtype])


def test_saturated_distributions(policies: ModuleType, entropy: bool) -> None:
    """One token has nearly all the probability, and others underflow; the log-probability itself is large."""
    cell = policies.Cell(name="", entropy=entropy, dtype=torch.float32, scale=60.0)
    case = policies.Case.random(cell)
    assert case.defined()["log_probability"].min() < -100
    check(policies, case, 1e-6)


def test_a_real_vocabulary(policies: ModuleType, entropy: bool) -> None:
    """151,936 tokens in fp32: the sums are long."""
    logits_NV = 2 * torch.randn(3, 151_936, generator=torch.Generator().manual_seed(0))
    cell = policies.Cell(name="", entropy=entropy, dtype=torch.float32, tokens=3)
    case = replace(
        policies.Case.random(cell),
        leaves={"logits": logits_NV.requires_grad_()},
        tokens_N=torch.tensor([0, 151_935, 7]),
    )
    check(policies, case, 1e-6)


def test_bfloat16(policies: ModuleType, form: str, entropy: bool) -> None:
    cell = policies.Cell(name="", form=form, entropy=entropy, dtype=torch.bfloat16, bias=True, tokens=40)
    case = policies.Case.random(cell)
    policies.compare_rounded(case, case.ours())


def test_the_gradient_of_a_bfloat16_weight_is_summed_in_fp32() -> None:
    """Over 64 chunks that all add the same: sums that are rounded on the way would drift off by several units."""
    tokens = 64 * 128
    hidden_NH = torch.full((tokens, 2), 1.125, dtype=torch.bfloat16)
    weight_VH = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    bias_V = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    found = hidden_log_probabilities(
        hidden_NH, weight_VH, torch.zeros(tokens).long(), FusedOps(), bias_V=bias_V, budget=1
    )  # fmt: skip
    (3 * found.log_probability_N.sum()).backward()
    slope_V = tokens * torch.tensor([2.0, -1.0, -1.0])  # each a whole number, at p = 1/3
    torch.testing.assert_close(bias_V.grad.float(), slope_V, rtol=2**-9, atol=0)
    torch.testing.assert_close(weight_VH.grad.float(), 1.125 * slope_V[:, None].expand(3, 2), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_shared_with_other_losses(policies: ModuleType, entropy: bool, dtype: torch.dtype) -> None:
    """A log-prob loss, an entropy loss and a cross-entropy to other tokens use one tensor: in one backward pass or in
    three, in either order, nothing is overwritten and the gradient is that of float64."""
    case = policies.Case.random(policies.Cell(name="", entropy=entropy, dtype=dtype, scale=5.0, temperature=0.7))
    leaf_NV, others_N = case.leaves["logits"], case.tokens_N.flip(0)
    defined = case.defined()["logits"]
    exact_NV = leaf_NV.detach().double().requires_grad_()
    own_NV = torch.zeros_like(exact_NV)
    for n, other in enumerate(others_N.tolist()):  # of the cross-entropy, summed: softmax less one-hot
        own_NV[n] = exact_NV[n].detach().exp() / exact_NV[n].detach().exp().sum()
        own_NV[n, other] -= 1
    for order in ("together", "first", "last"):
        logits_NV = leaf_NV * 1  # what a model returns: no leaf, and others' saved tensor
        shared, version = logits_NV.detach().clone(), logits_NV._version
        cross = F.cross_entropy(logits_NV, others_N, reduction="sum")
        found = replace(case, leaves={"logits": logits_NV}).find()
        ours = case.loss(found.log_probability_N, found.entropy_N)
        sines = logits_NV.sin().sum()  # its backward pass reads the logits themselves
        leaf_NV.grad = None
        losses = {"together": [ours + cross + sines], "first": [ours, cross, sines], "last": [sines, cross, ours]}[
            order
        ]
        for place, loss in enumerate(losses):
            loss.backward(retain_graph=place < len(losses) - 1)
        assert logits_NV._version == version
        assert torch.equal(logits_NV, shared)
        want = {"logits": defined + own_NV + exact_NV.detach().cos()}
        policies.compare({"logits": leaf_NV.grad}, want, policies.TOLERANCE[dtype], order)


def test_one_backward_pass_for_both_outputs(policies: ModuleType, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each alone, and one after the other."""
    from torchspec.core.objectives import log_probabilities

    runs = []
    function = log_probabilities._OfLogits if form == "logits" else log_probabilities._OfHidden
    backward = function.backward
    monkeypatch.setattr(function, "backward", staticmethod(lambda *given: runs.append(1) or backward(*given)))
    cell = policies.Cell(name="", form=form, bias=True)
    case = policies.Case.random(cell)
    found, want = case.find(), case.defined()
    both = case.gradients(case.loss(found.log_probability_N, found.entropy_N))
    assert len(runs) == 1
    found = case.find()
    log_probability = case.loss(found.log_probability_N, None)
    entropy = case.loss(found.log_probability_N.detach(), found.entropy_N)
    leaves = list(case.leaves.values())
    one = torch.autograd.grad(log_probability, leaves, retain_graph=True)
    other = torch.autograd.grad(entropy, leaves, retain_graph=True)
    again = torch.autograd.grad(entropy, leaves)
    for name, first, second, repeated in zip(case.leaves, one, other, again, strict=True):
        policies.compare({name: both[name]}, {name: want[name]}, 1e-13)
        policies.compare({name: first + second}, {name: want[name]}, 1e-13)
        assert torch.equal(second, repeated)


def test_gradcheck(policies: ModuleType, form: str, entropy: bool) -> None:
    cell = policies.Cell(name="", form=form, entropy=entropy, tokens=4, bias=True, temperature=0.7, ignored="some")
    case = policies.Case.random(cell)
    names = list(case.leaves)

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        found = replace(case, leaves=dict(zip(names, values, strict=True))).find()
        return tuple(x for x in (found.log_probability_N, found.entropy_N) if x is not None)

    assert torch.autograd.gradcheck(outputs, tuple(case.leaves.values()))


def test_a_second_derivative_is_refused(policies: ModuleType, form: str, entropy: bool) -> None:
    """Where the gradient of the outputs is a constant, too; and only where it is asked for."""
    case = policies.Case.random(policies.Cell(name="", form=form, entropy=entropy, bias=True, ignored="some"))
    leaves, want = list(case.leaves.values()), case.ours()
    found = case.find()
    for loss in (case.loss(found.log_probability_N, found.entropy_N), found.log_probability_N.square().sum()):
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            with pytest.raises(RuntimeError, match="differentiable once"):
                torch.autograd.grad((gradient * leaf).sum(), leaves, retain_graph=True)
    again = case.find()
    gradients = torch.autograd.grad(case.loss(again.log_probability_N, again.entropy_N), leaves, create_graph=True)
    for name, gradient in zip(case.leaves, gradients, strict=True):
        assert torch.equal(gradient.detach(), want[name])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_what_is_masked_has_no_part_in_it(policies: ModuleType, dtype: torch.dtype, entropy: bool) -> None:
    """A vocabulary padded with -inf, or with the lowest number of the dtype, is the vocabulary without the padding."""
    whole_NV = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    tokens_N = torch.tensor([0, 10, 24, 3, 3, 7])

    def run(logits_NV: Tensor) -> tuple[Tensor, ...]:
        logits_NV = logits_NV.clone().requires_grad_()
        found = token_log_probabilities(logits_NV, tokens_N, FusedOps(), entropy=entropy)
        loss = found.log_probability_N.sum() + (0 if found.entropy_N is None else 3 * found.entropy_N.sum())
        return (found.log_probability_N, *torch.autograd.grad(loss, logits_NV), found.entropy_N)

    want, gradient_NV, want_entropy = run(whole_NV[:, :25])
    for lowest in (-torch.inf, torch.finfo(dtype).min):
        padded_NV = whole_NV.clone()
        padded_NV[:, 25:] = lowest
        got, got_NV, got_entropy = run(padded_NV)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert not got_NV[:, 25:].any()
        torch.testing.assert_close(got_NV[:, :25], gradient_NV, rtol=2**-8, atol=1e-6)
        if entropy:
            torch.testing.assert_close(got_entropy, want_entropy, rtol=1e-6, atol=1e-6)


def test_an_impossible_token_and_a_certain_one(policies: ModuleType) -> None:
    logits_NV = torch.tensor([[-torch.inf, 0.0, 0.0], [-torch.inf, 5.0, -torch.inf]], requires_grad=True)
    found = token_log_probabilities(logits_NV, torch.tensor([0, 1]), FusedOps(), entropy=True)
    assert found.log_probability_N.tolist() == [-torch.inf, 0.0]
    assert found.entropy_N is not None
    assert found.entropy_N.tolist() == pytest.approx([0.6931472, 0.0])
    (gradient_NV,) = torch.autograd.grad(found.entropy_N.sum(), logits_NV)
    assert gradient_NV.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_row_that_has_no_distribution_is_nan_as_in_torch() -> None:
    logits_NV = torch.tensor([[-torch.inf, -torch.inf], [torch.nan, 0.0], [torch.inf, 0.0], [0.0, 1.0]])
    tokens_N = torch.tensor([0, 1, 1, 1])
    found = token_log_probabilities(logits_NV, tokens_N, FusedOps(), entropy=True)
    want = logits_NV.log_softmax(-1)[torch.arange(4), tokens_N]
    torch.testing.assert_close(found.log_probability_N, want, equal_nan=True)
    assert found.entropy_N is not None
    assert found.entropy_N.isnan().tolist() == [True, True, True, False]


def test_what_does_not_count_may_be_anything(policies: ModuleType, form: str, entropy: bool) -> None:
    """NaN in the rows of ignored tokens reaches neither values nor gradients, under any ignored value."""
    case = policies.Case.random(policies.Cell(name="", form=form, entropy=entropy, ignored="some"))
    want = case.ours()
    gone_N = case.tokens_N == policies.IGNORED
    first = next(iter(case.leaves))
    spoilt = case.leaves[first].detach().clone()
    spoilt[gone_N] = torch.nan
    got = replace(case, leaves={**case.leaves, first: spoilt.requires_grad_()}).ours()
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert not got["log_probability"][gone_N].any()
    assert not got[first][gone_N].any()
    logits_NV = torch.randn(3, 5)
    padded = token_log_probabilities(logits_NV, torch.tensor([2, 0, 2]), FusedOps(), ignore_index=2)
    assert padded.log_probability_N.count_nonzero() == 1


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 255, 256, 257, 400])
def test_chunks_change_nothing(policies: ModuleType, form: str, tokens: int) -> None:
    cell = policies.Cell(name="", form=form, tokens=tokens, bias=True, budget=1)
    case = policies.Case.random(cell)
    whole = replace(case, cell=replace(cell, budget=1 << 30)).ours(ops=FusedOps())
    policies.compare(case.ours(), whole, 1e-13)
    if tokens:
        check(policies, case, 1e-13)


def test_views_and_small_integers(policies: ModuleType) -> None:
    case = policies.Case.random(policies.Cell(name=""))
    want = case.ours()
    room = torch.zeros(policies.V, 2 * case.cell.tokens, dtype=torch.float64)
    room[:, ::2] = case.leaves["logits"].detach().T
    strided = room.T[::2].requires_grad_()
    assert not strided.is_contiguous()
    got = replace(case, leaves={"logits": strided}, tokens_N=case.tokens_N.to(torch.int8)).ours()
    policies.compare(got, want, 1e-14)
    bytes_N = torch.tensor([156, 3], dtype=torch.uint8)  # -100 would be 156 in it
    found = token_log_probabilities(torch.zeros(2, 300), bytes_N, FusedOps())
    assert found.log_probability_N.tolist() == pytest.approx([-5.7037825, -5.7037825])


def test_autocast_does_not_round(policies: ModuleType, form: str) -> None:
    case = policies.Case.random(policies.Cell(name="", form=form, dtype=torch.float32, bias=True))
    want = case.ours()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.ours()
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("token", [-1, 5, 99])
def test_a_token_that_is_nowhere(token: int, form: str) -> None:
    tokens_N = torch.tensor([0, token, -100, 4])
    message = re.escape(f"1 of 4 tokens are not in 0..4; the first is {token}, in row 1")
    given = (torch.zeros(4, 5),) if form == "logits" else (torch.zeros(4, 2), torch.zeros(5, 2))
    run = token_log_probabilities if form == "logits" else hidden_log_probabilities
    with pytest.raises(ValueError, match=message):
        run(*given, tokens_N, FusedOps())


def test_everything_wrong_with_the_arguments_is_said_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"logits are a .* not \[4\] torch.int64 on cpu.*tokens are.*temperature.* not 0"
    ):
        token_log_probabilities(torch.zeros(4).long(), torch.zeros(3), FusedOps(), temperature=0)
    with pytest.raises(ValueError, match=r"floats, of 16 bits or more.*float8.*a temperature is one number.*tensor"):
        token_log_probabilities(
            torch.zeros(2, 5).to(torch.float8_e4m3fn),
            torch.zeros(2).long(),
            FusedOps(),
            temperature=torch.ones(2),  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match=r"tokens are one.*temperature.*inf; weight is .*; bias has"):
        hidden_log_probabilities(
            torch.zeros(4, 2), torch.zeros(5, 3), torch.zeros(4), FusedOps(),
            bias_V=torch.zeros(4), temperature=float("inf"),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"weight is a matrix of hidden's width, dtype .*bfloat16"):
        hidden_log_probabilities(
            torch.zeros(4, 2), torch.zeros(5, 2).bfloat16(), torch.zeros(4).long(), FusedOps()
        )  # fmt: skip


def test_arguments_of_another_kind_are_refused_together() -> None:
    logits_NV, tokens_N, ops = torch.zeros(2, 5), torch.zeros(2).long(), FusedOps()
    whole = {"logits_NV": logits_NV, "tokens_N": tokens_N, "ops": ops}
    for wrong, said in (
        ({"tokens_N": [1, 2]}, "tokens: list, expected a tensor"),
        ({"logits_NV": logits_NV.to("meta")}, "logits: on the meta device"),
        ({"logits_NV": logits_NV.to_sparse()}, "logits: sparse_coo"),
        ({"ops": "cpu"}, "ops: str, expected the `ops` of a device"),
        ({"shards": (3, 2)}, "shards: tuple, expected VocabularyShards"),
        ({"entropy": 1}, "entropy: int, expected True or False"),
        ({"temperature": "1"}, "temperature: str, expected a number"),
        ({"ignore_index": None}, "ignore_index: NoneType, expected a whole number"),
        ({"ignore_index": True}, "ignore_index: bool, expected a whole number"),
    ):
        with pytest.raises(TypeError, match=re.escape(said)):
            token_log_probabilities(**{**whole, **wrong})
    with pytest.raises(TypeError, match=r"logits: NoneType, .*; tokens: list, .*; ops: NoneType, .*"):
        token_log_probabilities(None, [1], None)  # type: ignore[arg-type]
    parts: Any = {"hidden_NH": torch.zeros(2, 4), "weight_VH": torch.zeros(5, 4), "tokens_N": tokens_N, "ops": ops}
    for wrong, said in (({"weight_VH": None}, "weight: NoneType"), ({"bias_V": [0.0]}, "bias: list"),
                        ({"budget": "1"}, "budget: str, expected a whole number of bytes")):  # fmt: skip
        with pytest.raises(TypeError, match=said):
            hidden_log_probabilities(**{**parts, **wrong})
    for budget in (0, -5):
        with pytest.raises(ValueError, match=f"a budget is 1 byte or more, not {budget}"):
            hidden_log_probabilities(**parts, budget=budget)


def test_a_temperature_may_be_a_tensor_but_is_not_trained() -> None:
    logits_NV, tokens_N = torch.randn(2, 5), torch.tensor([1, 4])
    plain = token_log_probabilities(logits_NV, tokens_N, FusedOps(), temperature=0.5)
    given = token_log_probabilities(logits_NV, tokens_N, FusedOps(), temperature=torch.tensor([0.5]))  # type: ignore[arg-type]
    assert torch.equal(plain.log_probability_N, given.log_probability_N)
    with pytest.raises(ValueError, match="positive and finite and not trained"):
        token_log_probabilities(logits_NV, tokens_N, FusedOps(), temperature=torch.ones((), requires_grad=True))  # type: ignore[arg-type]
