"""The training forward against the definition, recomputed slot by slot, step by step, key by key, in float64.

The oracle reads the head's tensors under their published names and shares no code with the implementation: a slot's
attention is a Python list of keys, and supervision is looked up token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from torchspec.core.features.rows import TokenRows

CASES = (("mimo", "qwen2"), ("deepseek", "llama"), ("qwen", "qwen3"))
LAYERS, HEADS, KV_HEADS, HEAD_DIM, THETA, EPS = 3, 4, 2, 8, 16.0, 1e-3
STEPS, BETA = 3, 0.6

# prefix, of the layer; norm of the embedding, of the state, proj, final norm
NAMES = {
    "mimo": (
        "model.mtp_layers.0.", "token_layernorm.weight", "hidden_layernorm.weight", "input_proj.weight",
        "final_layernorm.weight",
    ),
    "deepseek": ("model.layers.3.", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"),
    "qwen": (
        "mtp.layers.0.", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "fc.weight", "norm.weight",
    ),
}  # fmt: skip


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / ((x * x).sum() / x.numel() + EPS).sqrt()


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
    """One row of the micro-batch: tokens x, mask m, documents d, the states that the target hands over, its
    distributions' last states."""

    world: Any
    family: str
    params: dict[str, Tensor]
    x: list[int]
    m: list[bool]
    d: list[int]
    handed: Tensor
    last: Tensor
    memo: dict[tuple[int, int], tuple[Tensor, list[Tensor], list[Tensor]]] = field(default_factory=dict)

    def layer(self, name: str) -> Tensor:
        return self.params[NAMES[self.family][0] + name]

    def around(self, part: int) -> Tensor:
        prefix = "mtp." if self.family == "qwen" else NAMES[self.family][0]
        return self.params[prefix + NAMES[self.family][part]]

    def position(self, i: int) -> int:
        return i - self.d.index(self.d[i])

    def state(self, i: int, k: int) -> Tensor:
        """What step k of slot i reads beside its token."""
        if k == 0:
            return self.handed[i]
        out = self.slot(i, k - 1)[0]
        return out if self.family == "deepseek" else rms(out, self.around(4))

    def slot(self, i: int, k: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(output before the final norm, keys per kv head, values per kv head) of slot i at step k."""
        if (i, k) in self.memo:
            return self.memo[i, k]
        e = self.world.head.embedding_VH[self.x[i + 1 + k]]
        place = self.position(i) + k
        if place == 0 and self.family != "qwen":
            e = torch.zeros_like(e)
        e, h = rms(e, self.around(1)), rms(self.state(i, k), self.around(2))
        x = self.around(3) @ torch.cat([h, e] if self.family == "mimo" else [e, h])
        n = rms(x, self.layer("input_layernorm.weight"))

        def split(name: str, count: int) -> list[Tensor]:
            flat = self.layer(f"self_attn.{name}_proj.weight") @ n
            if self.family == "mimo":
                flat = flat + self.layer(f"self_attn.{name}_proj.bias")
            parts = [flat[a * HEAD_DIM : (a + 1) * HEAD_DIM] for a in range(count)]
            if self.family == "qwen" and name != "v":
                parts = [rms(part, self.layer(f"self_attn.{name}_norm.weight")) for part in parts]
            return parts

        q = [rotate(head, place) for head in split("q", HEADS)]
        own_k = [rotate(head, place) for head in split("k", KV_HEADS)]
        own_v = split("v", KV_HEADS)
        mixed = []
        for a in range(HEADS):
            b = a // (HEADS // KV_HEADS)
            seen: list[tuple[Tensor, Tensor]] = []
            for j in range(i + 1):
                if self.d[j] != self.d[i]:
                    continue
                if j == i and k == 0:
                    seen.append((own_k[b], own_v[b]))
                else:
                    _, keys, values = self.slot(j, 0)
                    seen.append((keys[b], values[b]))
            for s in range(1, k + 1):
                keys, values = (own_k, own_v) if s == k else self.slot(i, s)[1:]
                seen.append((keys[b], values[b]))
            scores = torch.stack([(q[a] * key).sum() / math.sqrt(HEAD_DIM) for key, _ in seen])
            weights = scores.exp() / scores.exp().sum()
            mixed.append(sum((weights[w] * value for w, (_, value) in enumerate(seen)), torch.zeros(HEAD_DIM).double()))
        r = x + self.layer("self_attn.o_proj.weight") @ torch.cat(mixed)
        n = rms(r, self.layer("post_attention_layernorm.weight"))
        gate, up = self.layer("mlp.gate_proj.weight") @ n, self.layer("mlp.up_proj.weight") @ n
        out = r + self.layer("mlp.down_proj.weight") @ (gate / (1 + (-gate).exp()) * up)
        self.memo[i, k] = (out, own_k, own_v)
        return self.memo[i, k]

    def logits(self, i: int, k: int) -> Tensor:
        made: Tensor = self.world.head.head_VH @ rms(self.slot(i, k)[0], self.around(4))
        return made

    def supervised(self, i: int, k: int) -> bool:
        j = i + 2 + k
        return j < len(self.x) and self.m[j] and self.d[i] == self.d[j]


@pytest.mark.parametrize("normalisation", ["token", "per_sequence"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_loss_and_every_gradient_are_the_definitions(
    make_world: Callable[..., Any], family: str, kind: str, normalisation: str
) -> None:
    world = make_world(family, kind, normalisation=normalisation)
    assert world.algorithm.options.unroll == STEPS
    assert world.algorithm.options.step_decay == BETA
    # Ragged rows; the first packs two documents, and supervision runs across their border.
    documents = [[0] * 6 + [1] * 5, [2] * 8, [3] * 3, [4] * 2]
    masks = [[0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0, 1], [1, 1, 1], [1, 1]]
    tokens = [world.tokens(len(d), seed) for seed, d in enumerate(documents)]
    features = [world.features(ids_T, seed, "post_norm") for seed, ids_T in enumerate(tokens)]
    pad = torch.nn.utils.rnn.pad_sequence
    rows = TokenRows(
        input_ids_BT=pad(tokens, batch_first=True),
        loss_mask_BT=pad([torch.tensor(m, dtype=torch.bool) for m in masks], batch_first=True),
        document_BT=pad([torch.tensor(d) for d in documents], batch_first=True, padding_value=-1),
    )
    result = world.algorithm.run(world.draft, world.head, world.assembled(rows, features), world.device)
    (result.numerator / result.denominator).backward()

    stored = load_file(world.algorithm.target.path / "model.safetensors")
    published = {
        ours: world.algorithm.geometry.rules.stored(ours, LAYERS) for ours, _ in world.draft.named_parameters()
    }
    params = {name: stored[name].double().requires_grad_() for name in published.values()}
    # The target's own final norm computes in fp32: its answer is an input here.
    handed = [f.taps_TNH[:, 0] for f in features]
    if family != "mimo":
        handed = [world.head.normed(h, "pre_norm") for h in handed]
    oracles = [
        Oracle(world, family, params, t.tolist(), [bool(v) for v in m], d, h, f.last_TH)
        for t, m, d, h, f in zip(tokens, masks, documents, handed, features, strict=True)
    ]
    zero = torch.zeros(()).double()
    sums = {number: [zero, zero] for number in range(5)}
    counted, correct, alpha = [0] * STEPS, [0] * STEPS, [0.0] * STEPS
    for k in range(STEPS):
        for oracle in oracles:
            for i in range(len(oracle.x)):
                if not oracle.supervised(i, k):
                    continue
                q = oracle.logits(i, k).softmax(-1)
                p = (world.head.head_VH @ oracle.last[i + 1 + k]).softmax(-1)
                total = sums[oracle.d[i]]
                total[0] = total[0] - BETA**k * q[oracle.x[i + 2 + k]].log()
                total[1] = total[1] + BETA**k
                counted[k] += 1
                correct[k] += int(q.argmax() == p.argmax())
                alpha[k] += float(torch.minimum(p, q.detach()).sum())
    real = [(a, b) for a, b in sums.values() if b > 0]
    if normalisation == "token":
        loss = sum(a for a, _ in real) / sum(b for _, b in real)
    else:
        loss = sum(a / b for a, b in real) / len(real)
    loss.backward()

    assert sum(counted) > 20
    torch.testing.assert_close(result.numerator / result.denominator, loss, rtol=1e-11, atol=0)
    for name, parameter in world.draft.named_parameters():
        gradient = params[published[name]].grad
        assert gradient is not None
        scale = gradient.abs().max()
        assert scale > 0, name
        assert parameter.grad is not None
        difference = (parameter.grad - gradient).abs().max()
        assert difference <= 1e-11 * scale, f"{name}: {difference / scale:.2e}"
    assert result.sums["supervised"].tolist() == counted
    assert result.sums["correct"].tolist() == correct
    torch.testing.assert_close(result.sums["alpha"], torch.tensor(alpha, dtype=torch.float64), rtol=1e-11, atol=1e-12)
