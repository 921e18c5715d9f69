"""The verification rule against its definition: by enumeration, and by counting what comes out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.decoding.generation import DecodeSettings
from torchspec.core.decoding.plain import decode_plain
from torchspec.core.decoding.prompt_lookup import PromptLookupDrafter
from torchspec.core.decoding.sampling import acceptance_probability, choose, residual, verify, verify_sampled
from torchspec.core.decoding.speculative import decode
from torchspec.core.interfaces.algorithm import Proposal

Make = Callable[..., Any]
DOUBLE = torch.float64


def simplex(*shape: int, seed: int, zeros: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*shape, dtype=DOUBLE, generator=generator)
    if zeros:
        weights[..., seed % shape[-1]] = 0.0
    return weights / weights.sum(-1, keepdim=True)


def p_value(counts: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's chi-square, cells with an expectation under 5 pooled; impossible cells must be empty."""
    observed, wanted = torch.tensor(counts, dtype=DOUBLE), torch.tensor(expected, dtype=DOUBLE)
    assert observed[wanted == 0].sum() == 0
    small = wanted < 5
    observed = torch.cat((observed[~small], observed[small].sum()[None]))
    wanted = torch.cat((wanted[~small], wanted[small].sum()[None]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor(len(wanted) - 1, dtype=DOUBLE)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_summing_over_drafted_tokens_gives_p(seed: int, zeros: bool) -> None:
    p_V, q_V = simplex(6, seed=seed), simplex(6, seed=seed + 50, zeros=zeros)
    out_V = torch.zeros(6, dtype=DOUBLE)
    for token in torch.arange(6)[q_V > 0]:
        stay = acceptance_probability(p_V[None, None], token[None, None], q_V[None, None])[0, 0]
        assert stay == pytest.approx(min(1.0, float(p_V[token] / q_V[token])))
        rest_V = residual(p_V[None], token[None], q_V[None])[0]
        out_V[token] += q_V[token] * stay
        out_V += q_V[token] * (1 - stay) * rest_V
    torch.testing.assert_close(out_V, p_V, rtol=0, atol=1e-14)


@pytest.mark.parametrize("token", range(4))
def test_a_one_hot_draft_gives_p(token: int) -> None:
    p_V, drafted = simplex(4, seed=3), torch.tensor(token)
    stay = acceptance_probability(p_V[None, None], drafted[None, None], None)[0, 0]
    rest_V = residual(p_V[None], drafted[None], None)[0]
    out_V = (1 - stay) * rest_V
    out_V[token] += stay
    torch.testing.assert_close(out_V, p_V, rtol=0, atol=1e-15)


def test_residual_of_equal_distributions_is_p() -> None:
    p_BV = simplex(3, 5, seed=1)
    torch.testing.assert_close(residual(p_BV, torch.zeros(3).long(), p_BV), p_BV)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("lengths", [None, (2, 2), (1, 1), (0, 2)])
def test_chain_verification_is_distributed_as_the_target(one_hot: bool, lengths: tuple[int, int] | None) -> None:
    """Two drafted tokens over a vocabulary of 3, 30,000 times per case: what is kept plus the target's next token,
    completed by the target itself to three tokens, against the exact joint probability of three tokens."""
    vocab, rows, temperature = 3, 30_000, 0.7
    logits = [torch.randn(vocab**k, vocab, dtype=DOUBLE, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    p = [(level / temperature).softmax(-1) for level in logits]
    q = [simplex(vocab**k, vocab, seed=20 + k) for k in range(2)]
    generator = torch.Generator().manual_seed(11)
    if one_hot:
        first = torch.full((rows,), 1)
        second = torch.full((rows,), 2)
    else:
        first = torch.multinomial(q[0].expand(rows, -1), 1, generator=generator)[:, 0]
        second = torch.multinomial(q[1][first], 1, generator=generator)[:, 0]
    both = first * vocab + second
    proposal = Proposal(
        tokens_BL=torch.stack((first, second), 1),
        probs_BLV=None if one_hot else torch.stack((q[0].expand(rows, -1), q[1][first]), 1),
        lengths_B=None if lengths is None else torch.tensor(lengths).repeat(rows // 2),
    )
    logits_BnV = torch.stack((logits[0].expand(rows, -1), logits[1][first], logits[2][both]), 1)
    verdict = verify(logits_BnV, proposal, temperature, generator)

    if lengths is not None:
        assert (verdict.accepted_B <= proposal.lengths_B).all()
    texts: Counter[tuple[int, ...]] = Counter()
    tail = torch.Generator().manual_seed(12)
    ends = torch.rand(rows, 2, generator=tail)
    for row, (count, token) in enumerate(zip(verdict.accepted_B.tolist(), verdict.next_B.tolist(), strict=True)):
        text = [*proposal.tokens_BL[row, :count].tolist(), token]
        while len(text) < 3:
            index = text[0] if len(text) == 1 else text[0] * vocab + text[1]
            cumulative = p[len(text)][index].cumsum(-1)
            text.append(min(int((cumulative < ends[row, len(text) - 1]).sum()), vocab - 1))
        texts[tuple(text)] += 1
    cells = list(itertools.product(range(vocab), repeat=3))
    expected = [float(p[0][0, a] * p[1][a, b] * p[2][a * vocab + b, c]) * rows for a, b, c in cells]
    assert p_value([texts[cell] for cell in cells], expected) > 1e-3


def exact_text_probabilities(target: Any, prompt: list[int], length: int, temperature: float) -> dict[tuple, float]:
    """Probability of every text by multiplying out the definition, ends of turn included."""
    out: dict[tuple, float] = {}

    def grow(text: tuple[int, ...], probability: float) -> None:
        if len(text) == length or (text and text[-1] in target.eos):
            out[text] = probability
            return
        p_V = (target.logits([*prompt, *text]).double() / temperature).softmax(-1)
        for token, p in enumerate(p_V.tolist()):
            grow((*text, token), probability * p)

    grow((), 1.0)
    return out


def sampled_p_value(target: Any, drafter: Any, *, rows: int = 6000, batch: int = 1500, draft_length: int = 2) -> float:
    prompt, temperature, length = [2, 0, 1], 0.8, 4
    request = DecodeSettings(max_new_tokens=length, draft_length=draft_length, temperature=temperature)
    texts: Counter[tuple[int, ...]] = Counter()
    for seed in range(rows // batch):
        prompts = [prompt] * batch
        if drafter is None:
            decoded = decode_plain(target, prompts, request, seed=seed)
        else:
            decoded = decode(target, drafter, prompts, request, seed=seed)
        texts.update(generation.tokens for generation in decoded.generations)
    exact = exact_text_probabilities(target, prompt, length, temperature)
    assert set(texts) <= set(exact)
    return p_value([texts[cell] for cell in exact], [p * rows for p in exact.values()])


@pytest.mark.parametrize("kind", ["draftless", "q known", "q is p", "deterministic", "ragged", "prompt lookup"])
def test_sampled_text_is_distributed_as_the_target(make_target: Make, make_drafter: Make, kind: str) -> None:
    target = make_target(9, vocab=3, states=127, eos=(2,))
    drafters = {
        "draftless": lambda: None,
        "q known": lambda: make_drafter(target, mix=0.4),
        "q is p": lambda: make_drafter(target, mix=1.0),
        "deterministic": lambda: make_drafter(target, one_hot=True),
        "ragged": lambda: make_drafter(target, mix=0.4, ragged=True),
        "prompt lookup": PromptLookupDrafter,
    }
    assert sampled_p_value(target, drafters[kind]()) > 1e-3


def test_a_draft_that_misstates_its_distribution_is_noticed(make_target: Make, make_drafter: Make) -> None:
    """The test above has the power to see it: q reported in the draft's own order instead of the target's."""
    target = make_target(9, vocab=3, states=127, eos=(2,))
    drafter = make_drafter(target, mix=0.4)

    def open_(batch_size: int) -> Any:
        session = type(drafter).open(drafter, batch_size)
        propose = session.propose

        def shuffled(*args: Any, **kwargs: Any) -> Proposal:
            proposal = propose(*args, **kwargs)
            return Proposal(tokens_BL=proposal.tokens_BL, probs_BLV=proposal.probs_BLV.roll(1, dims=-1))

        session.propose = shuffled
        return session

    drafter.open = open_
    assert sampled_p_value(target, drafter) < 1e-6


def test_a_token_the_target_never_says_is_never_kept() -> None:
    logits = torch.full((50_000, 2, 3), 0.0)
    logits[:, :, 1] = -torch.inf
    proposal = Proposal(tokens_BL=torch.ones(50_000, 1).long())
    verdict = verify_sampled(logits, proposal, 1.0, torch.Generator().manual_seed(0))
    assert verdict.accepted_B.sum() == 0
    assert (verdict.next_B != 1).all()


def test_greedy_takes_the_longest_agreeing_prefix() -> None:
    best = torch.tensor([[4, 2, 7, 1], [4, 2, 7, 1], [4, 2, 7, 1], [4, 2, 7, 1]])
    logits = torch.nn.functional.one_hot(best, 9).float()
    tokens = torch.tensor([[4, 2, 7], [4, 0, 7], [0, 2, 7], [4, 2, 7]])
    verdict = verify(logits, Proposal(tokens_BL=tokens, lengths_B=torch.tensor([3, 3, 3, 2])), 0.0)
    assert verdict.accepted_B.tolist() == [3, 1, 0, 2]
    assert verdict.next_B.tolist() == [1, 2, 4, 7]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_verifying_nothing_is_choosing(temperature: float) -> None:
    logits = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(0))
    empty = Proposal(tokens_BL=torch.zeros(4, 0, dtype=torch.int64))
    verdict = verify(logits, empty, temperature, torch.Generator().manual_seed(1))
    assert verdict.accepted_B.tolist() == [0] * 4
    reference = torch.Generator().manual_seed(1)
    assert verdict.next_B.tolist() == choose(logits[:, 0], temperature, reference).tolist()
