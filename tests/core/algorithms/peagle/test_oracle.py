"""The training forward against P-EAGLE's definition, recomputed element by element, key by key, in float64.

The oracle follows docs/concepts.md and shares no code with the implementation: elements are pairs in a list, what each
sees is asked of every other one, supervision is looked up token by token, and the target's distribution is sliced out
of a softmax over all V. Which elements there are is what `sampling` says, which has its own test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.algorithms.peagle.sampling import sample_rows
from torchspec.core.features.rows import TokenRows
from torchspec.core.interfaces.algorithm import Moment

# Powers of 16 are exact in every precision, so the frequencies are the definition's to the last bit.
THETA, HEAD_DIM = 16.0, 8
CONFIG = {
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}
Element = tuple[int, int]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / ((x * x).sum() / x.numel() + eps).sqrt()


def rotate(x: Tensor, position: int) -> Tensor:
    """One head; entry d turns with entry d + D/2 by the angle position * theta ** (-2 d / D)."""
    half = HEAD_DIM // 2
    out: list[Tensor] = [x.new_zeros(())] * HEAD_DIM
    for d in range(half):
        angle = position * THETA ** (-2 * d / HEAD_DIM)
        c, s = math.cos(angle), math.sin(angle)
        out[d] = c * x[d] - s * x[d + half]
        out[d + half] = s * x[d] + c * x[d + half]
    return torch.stack(out)


@dataclass
class Oracle:
    """One row of the micro-batch: tokens x, mask m, documents d, taps g, last hidden states, and its elements."""

    world: Any
    params: dict[str, Tensor]
    x: list[int]
    m: list[bool]
    d: list[int]
    g: Tensor
    last: Tensor
    elements: list[Element]

    def target(self, j: int) -> Tensor:
        """p_full of position j over all V; the features hold normed states, since the target norms in fp32."""
        probs: Tensor = (self.world.head.head_VH @ self.last[j]).softmax(-1)
        return probs

    def sees(self, query: Element, key: Element) -> bool:
        (a, j), (b, i) = query, key
        return self.d[a] == self.d[b] and ((i == 0 and b <= a) or (a == b and i <= j))

    def outputs(self) -> dict[Element, Tensor]:
        """The last layer's, of every element."""
        w, geometry = self.params, self.world.algorithm.geometry
        mask = w["fc.weight"] @ w["mask_hidden"].flatten()
        state = {(a, j): w["fc.weight"] @ self.g[a] if j == 0 else mask for a, j in self.elements}
        for number in range(geometry.num_layers):
            state = self.layer(state, number)
        return state

    def layer(self, state: dict[Element, Tensor], number: int) -> dict[Element, Tensor]:
        geometry = self.world.algorithm.geometry
        prefix = f"layers.{number}."
        w = {name.removeprefix(prefix): p for name, p in self.params.items() if name.startswith(prefix)}
        eps, heads, kv_heads = geometry.rms_norm_eps, geometry.num_attention_heads, geometry.num_key_value_heads
        table = self.params.get("embed_tokens.weight", self.world.head.embedding_VH)
        residual, keys, values, queries = {}, {}, {}, {}
        for a, j in self.elements:
            h = residual[a, j] = state[a, j]
            if number == 0:
                token = self.x[a + 1] if j == 0 and a + 1 < len(self.x) else geometry.mask_token if j else 0
                normed = rms(h, w["hidden_norm.weight"], eps)
                z = torch.cat([rms(table[token], w["input_layernorm.weight"], eps), normed])
                if geometry.norm_before_residual:
                    residual[a, j] = normed
            else:
                z = rms(h, w["input_layernorm.weight"], eps)
            place = a - self.d.index(self.d[a]) + j

            def split(name: str, count: int, z: Tensor = z) -> list[Tensor]:
                flat = w[f"self_attn.{name}_proj.weight"] @ z
                return [flat[n * HEAD_DIM : (n + 1) * HEAD_DIM] for n in range(count)]

            queries[a, j] = [rotate(head, place) for head in split("q", heads)]
            keys[a, j] = [rotate(head, place) for head in split("k", kv_heads)]
            values[a, j] = split("v", kv_heads)
        out = {}
        for e in self.elements:
            seen = [key for key in self.elements if self.sees(e, key)]
            mixed = []
            for n in range(heads):
                group = n // (heads // kv_heads)
                scores = torch.stack([(queries[e][n] * keys[f][group]).sum() / math.sqrt(HEAD_DIM) for f in seen])
                weights = scores.exp() / scores.exp().sum()
                mixed.append((weights[:, None] * torch.stack([values[f][group] for f in seen])).sum(0))
            r = residual[e] + w["self_attn.o_proj.weight"] @ torch.cat(mixed)
            inner = rms(r, w["post_attention_layernorm.weight"], eps)
            gate, up = w["mlp.gate_proj.weight"] @ inner, w["mlp.up_proj.weight"] @ inner
            out[e] = r + w["mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
        return out

    def supervised(self, a: int, j: int) -> bool:
        place = a + 2 + j
        return place < len(self.x) and self.m[place] and self.d[a] == self.d[place]


@dataclass
class Expected:
    """Sums over everything, in the order of the definition."""

    by_document: dict[int, list[Tensor]] = field(default_factory=dict)
    supervised: list[int] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


def expected_sums(oracles: list[Oracle], depths: int, decay: float, coverage: str, ids: list[int]) -> Expected:
    total = Expected()
    eps = oracles[0].world.algorithm.geometry.rms_norm_eps
    states = [oracle.outputs() for oracle in oracles]
    for depth in range(depths):
        row = {"supervised": 0, "counted": 0.0, "correct": 0, "alpha": 0.0, "kl": 0.0}
        for oracle, state in zip(oracles, states, strict=True):
            for a, j in oracle.elements:
                if j != depth or not oracle.supervised(a, j):
                    continue
                w = oracle.params
                q = (w["lm_head.weight"] @ rms(state[a, j], w["norm.weight"], eps)).softmax(-1)
                full = oracle.target(a + 1 + j)
                inside = full[ids]
                p = inside / inside.sum()
                best = int(full.argmax())
                share = {"drop": float(best in ids), "renormalise": 1.0, "weight": float(inside.sum())}[coverage]
                ce = -(p * q.log()).sum()
                sums = total.by_document.setdefault(oracle.d[a], [torch.zeros(()).double(), torch.zeros(()).double()])
                sums[0] = sums[0] + decay**j * share * ce
                sums[1] = sums[1] + decay**j * share
                row["supervised"] += 1
                row["counted"] += share
                row["correct"] += int(ids[int(q.argmax())] == best)
                row["alpha"] += float(torch.minimum(inside, q.detach()).sum())
                row["kl"] += share * float((p * (p / q.detach()).log()).sum())
        for name, value in row.items():
            getattr(total, name).append(value)
    return total


CASES = {
    "one layer": {"num_layers": 1},
    "two layers": {"num_layers": 2, "coverage": "weight", "normalisation": "per_sequence", "depth_decay": 0.8},
    "own embedding": {
        "num_layers": 2,
        "coverage": "renormalise",
        "norm_before_residual": True,
        "draft_config": CONFIG | {"hidden_size": 24},
    },
    "everything": {"num_layers": 2, "depth_ratio": 1.0, "mask_token": 17},
}
DEPTHS = 4


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_the_definitions(make_world: Callable[..., Any], case: str) -> None:
    options = {"draft_config": CONFIG, "coverage": "drop", "depth_ratio": 0.8} | CASES[case]
    ids = [n for n in range(300) if n % 5 != 2]
    world = make_world(ids_N=torch.tensor(ids), depths=DEPTHS, taps=(0, 3), **options)
    # Ragged rows; the first packs two documents, and supervision runs across their border.
    documents = [[0] * 7 + [1] * 6, [2] * 9, [3] * 3, [4] * 2]
    masks = [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 0, 1], [1, 1, 1], [1, 1]]
    tokens = [world.tokens(len(d), seed) for seed, d in enumerate(documents)]
    features = [world.features(ids_T, seed, "post_norm") for seed, ids_T in enumerate(tokens)]
    pad = torch.nn.utils.rnn.pad_sequence
    rows = TokenRows(
        input_ids_BT=pad(tokens, batch_first=True),
        loss_mask_BT=pad([torch.tensor(m, dtype=torch.bool) for m in masks], batch_first=True),
        document_BT=pad([torch.tensor(d) for d in documents], batch_first=True, padding_value=-1),
    )
    moment = Moment(draws=(3, 1, 4, 1, 5))
    batch = world.assembled(rows, features, moment)
    result = world.algorithm.run(world.draft, world.head, batch, world.device, moment=moment)
    (result.numerator / result.denominator).backward()

    deepest_BT, _ = sample_rows(rows, world.algorithm.sampling, moment.draws)
    params = {name: p.detach().clone().requires_grad_() for name, p in world.draft.named_parameters()}
    oracles = [
        Oracle(
            world,
            params,
            t.tolist(),
            [bool(v) for v in m],
            d,
            f.taps_TNH.flatten(1),
            f.last_TH,
            [(a, j) for a in range(len(d)) for j in range(int(deepest_T[a]) + 1)],
        )
        for t, m, d, f, deepest_T in zip(tokens, masks, documents, features, deepest_BT, strict=True)
    ]
    want = expected_sums(oracles, DEPTHS, world.algorithm.options.depth_decay, options["coverage"], ids)
    counted = [(a, b) for a, b in want.by_document.values() if b > 0]
    if options.get("normalisation") == "per_sequence":
        loss = sum(a / b for a, b in counted) / len(counted)
    else:
        loss = sum(a for a, _ in counted) / sum(b for _, b in counted)
    loss.backward()

    assert all(count > 1 for count in want.supervised), want.supervised
    if options["coverage"] == "drop":
        assert 0 < sum(want.counted) < sum(want.supervised)
    torch.testing.assert_close(result.numerator / result.denominator, loss, rtol=1e-11, atol=0)
    for name, parameter in world.draft.named_parameters():
        assert parameter.grad is not None
        scale = params[name].grad.abs().max()
        assert scale > 0, name
        difference = (parameter.grad - params[name].grad).abs().max()
        assert difference <= 1e-11 * scale, f"{name}: {difference / scale:.2e}"
    sums = result.sums
    assert sums["supervised"].tolist() == want.supervised
    assert sums["correct"].tolist() == want.correct
    got = torch.stack([sums["counted"], sums["alpha"], sums["cross_entropy"] - sums["entropy"]])
    sought = torch.tensor([want.counted, want.alpha, want.kl], dtype=torch.float64)
    torch.testing.assert_close(got, sought, rtol=1e-11, atol=1e-12)
