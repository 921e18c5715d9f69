"""The training forward against the definitions of EAGLE-3 and EAGLE-3.1, recomputed key by key in float64.

The oracle follows docs/concepts.md and shares no code with the implementation: a slot's attention is a Python list of
keys, supervision is looked up token by token, and the target's distribution is sliced out of a softmax over all V.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.features.rows import TokenRows

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
LATENT = {
    "kv_lora_rank": 9,
    "q_lora_rank": 7,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 64,
        "mscale": 0.7, "mscale_all_dim": 1.3,
    },
}  # fmt: skip
# By widths of unrotated and rotated part and of values: heads with padding in all, in keys alone, and without.
WIDTHS = {"padded": (6, 4, 5), "wide_values": (8, 4, 16), "even": (4, 4, 8)}
SIZE_NAMES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


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
    """One row of the micro-batch: tokens x, mask m, documents d, taps g, last hidden states."""

    world: Any
    params: dict[str, Tensor]
    x: list[int]
    m: list[bool]
    d: list[int]
    g: Tensor
    last: Tensor
    memo: dict[tuple[int, int], tuple[Tensor, list[Tensor], list[Tensor]]] = field(default_factory=dict)

    def position(self, i: int) -> int:
        return i - self.d.index(self.d[i])

    def target(self, j: int) -> Tensor:
        """p_full of position j over all V; the features hold normed states, since the target norms in fp32."""
        probs: Tensor = (self.world.head.head_VH @ self.last[j]).softmax(-1)
        return probs

    def slot(self, i: int, k: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(output, keys per kv head, values per kv head) of slot i at step k."""
        if (i, k) in self.memo:
            return self.memo[i, k]
        w, geometry = self.params, self.world.algorithm.geometry
        eps, heads, kv_heads = geometry.rms_norm_eps, geometry.num_attention_heads, geometry.num_key_value_heads
        h = self.first_feature(i) if k == 0 else self.slot(i, k - 1)[0]
        if k > 0 and geometry.norm_output:
            h = rms(h, w["norm.weight"], eps)
        table = w.get("embed_tokens.weight", self.world.head.embedding_VH)
        e = table[self.x[i + 1 + k]]
        h_normed = rms(h, w["midlayer.hidden_norm.weight"], eps)
        z = torch.cat([rms(e, w["midlayer.input_layernorm.weight"], eps), h_normed])

        q, own_k, own_v = self.heads(z, self.position(i) + k)
        mixed = []
        for a in range(heads):
            b = a // (heads // kv_heads)
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
            scores = torch.stack([(q[a] * key).sum() * self.scale for key, _ in seen])
            weights = scores.exp() / scores.exp().sum()
            nothing = torch.zeros_like(own_v[b])
            mixed.append(sum((weights[n] * value for n, (_, value) in enumerate(seen)), nothing))
        residual = h_normed if geometry.norm_before_residual else h
        r = residual + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(mixed)
        n = rms(r, w["midlayer.post_attention_layernorm.weight"], eps)
        gate, up = w["midlayer.mlp.gate_proj.weight"] @ n, w["midlayer.mlp.up_proj.weight"] @ n
        out = r + w["midlayer.mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
        self.memo[i, k] = (out, own_k, own_v)
        return self.memo[i, k]

    scale = 1 / math.sqrt(HEAD_DIM)

    def heads(self, z: Tensor, place: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Rotated queries and keys, and values, of every head."""
        geometry = self.world.algorithm.geometry

        def split(name: str, count: int) -> list[Tensor]:
            flat = self.params[f"midlayer.self_attn.{name}_proj.weight"] @ z
            return [flat[a * HEAD_DIM : (a + 1) * HEAD_DIM] for a in range(count)]

        q, k, v = (split(n, geometry.num_attention_heads if n == "q" else geometry.num_key_value_heads) for n in "qkv")
        return [rotate(head, place) for head in q], [rotate(head, place) for head in k], v

    def first_feature(self, i: int) -> Tensor:
        w, geometry = self.params, self.world.algorithm.geometry
        read: list[Tensor] = []
        for n in range(geometry.num_taps):
            tap = self.g[i][n * geometry.target_hidden_size : (n + 1) * geometry.target_hidden_size]
            read.append(rms(tap, w[f"fc_norm.{n}.weight"], geometry.rms_norm_eps) if geometry.fc_norm else tap)
        taps = torch.cat(read)
        return w["fc.weight"] @ (
            rms(taps, w["input_norm.weight"], geometry.rms_norm_eps) if "input_norm.weight" in w else taps
        )

    def supervised(self, i: int, k: int) -> bool:
        j = i + 2 + k
        return j < len(self.x) and self.m[j] and self.d[i] == self.d[j]


def stretched(pair: int) -> float:
    """YaRN's frequency of a pair (2309.00071): between one that turns 32 times in the original length and keeps its
    frequency, and one that turns once and has it divided by the factor; the borders rounded outwards."""
    width, length = 4, 64

    def border(turns: float) -> float:
        return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(THETA))

    low, high = max(0, math.floor(border(32))), min(width - 1, math.ceil(border(1)))
    kept = 1 - min(1, max(0, (pair - low) / (high - low)))
    plain = THETA ** (-2 * pair / width)
    return float(plain * kept + plain / 4.0 * (1 - kept))


def turn(x: Tensor, place: int) -> Tensor:
    """Entries 2i and 2i + 1 by the frequency of pair i; longer by mscale's factor over that of mscale_all_dim."""
    out, longer = [], (0.07 * math.log(4.0) + 1) / (0.13 * math.log(4.0) + 1)
    for i in range(len(x) // 2):
        c, s = math.cos(place * stretched(i)), math.sin(place * stretched(i))
        out += [longer * (c * x[2 * i] - s * x[2 * i + 1]), longer * (s * x[2 * i] + c * x[2 * i + 1])]
    return torch.stack(out)


class LatentOracle(Oracle):
    """Multi-head latent attention (2405.04434, section 2.1), with the norms of latents that DeepSeek-V2 has."""

    @property
    def scale(self) -> float:  # type: ignore[override]
        geometry = self.world.algorithm.geometry
        width = geometry.qk_nope_head_dim + geometry.qk_rope_head_dim
        return float((0.13 * math.log(4.0) + 1) ** 2 / math.sqrt(width))

    def heads(self, z: Tensor, place: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        geometry = self.world.algorithm.geometry
        w = {n.removeprefix("midlayer.self_attn."): p for n, p in self.params.items()}
        plain, turning = geometry.qk_nope_head_dim, geometry.qk_rope_head_dim
        c_q = rms(w["q_a_proj.weight"] @ z, w["q_a_layernorm.weight"], geometry.rms_norm_eps)
        compressed = w["kv_a_proj_with_mqa.weight"] @ z
        c_kv = rms(compressed[: geometry.kv_lora_rank], w["kv_a_layernorm.weight"], geometry.rms_norm_eps)
        shared = turn(compressed[geometry.kv_lora_rank :], place)
        queries, keys, values = [], [], []
        for a in range(geometry.num_attention_heads):
            size = plain + turning
            q = w["q_b_proj.weight"][a * size : (a + 1) * size] @ c_q
            queries.append(torch.cat([q[:plain], turn(q[plain:], place)]))
            size = plain + geometry.v_head_dim
            both = w["kv_b_proj.weight"][a * size : (a + 1) * size] @ c_kv
            keys.append(torch.cat([both[:plain], shared]))
            values.append(both[plain:])
        return queries, keys, values


@dataclass
class Expected:
    """Sums over everything, in the order of the definition."""

    by_document: dict[int, list[Tensor]] = field(default_factory=dict)
    supervised: list[int] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


def expected_sums(oracles: list[Oracle], steps: int, decay: float, coverage: str, ids: list[int]) -> Expected:
    total = Expected()
    eps = oracles[0].world.algorithm.geometry.rms_norm_eps
    for k in range(steps):
        row = {"supervised": 0, "counted": 0.0, "correct": 0, "alpha": 0.0, "kl": 0.0}
        for oracle in oracles:
            for i in range(len(oracle.x)):
                if not oracle.supervised(i, k):
                    continue
                w = oracle.params
                q = (w["lm_head.weight"] @ rms(oracle.slot(i, k)[0], w["norm.weight"], eps)).softmax(-1)
                full = oracle.target(i + 1 + k)
                inside = full[ids]
                p = inside / inside.sum()
                best = int(full.argmax())
                share = {"drop": float(best in ids), "renormalise": 1.0, "weight": float(inside.sum())}[coverage]
                ce = -(p * q.log()).sum()
                sums = total.by_document.setdefault(oracle.d[i], [torch.zeros(()).double(), torch.zeros(()).double()])
                sums[0] = sums[0] + decay**k * share * ce
                sums[1] = sums[1] + decay**k * share
                row["supervised"] += 1
                row["counted"] += share
                row["correct"] += int(ids[int(q.argmax())] == best)
                row["alpha"] += float(torch.minimum(inside, q.detach()).sum())
                row["kl"] += share * float((p * (p / q.detach()).log()).sum())
        for name, value in row.items():
            getattr(total, name).append(value)
    return total


CASES = (
    [
        pytest.param(
            {"coverage": coverage, "normalisation": normalisation, **extra}, id=f"{coverage}-{normalisation}-{name}"
        )
        for coverage in ("drop", "renormalise", "weight")
        for normalisation in ("token", "per_sequence")
        for name, extra in (("same_width", {}), ("own_embedding", {"norm_before_residual": True}))
    ]
    + [
        pytest.param({"coverage": "drop", "normalisation": "token", **norms, **extra}, id=name)
        for name, norms, extra in (
            ("tap_norms", {"norm_output": False}, {}),
            ("output_norm", {"fc_norm": False}, {}),
            ("both_norms", {"fc_norm": True}, {}),
            ("norm_of_all_taps", {"fc_norm": False, "norm_before_fc": True}, {}),
            ("both_norms_own_embedding", {"fc_norm": True}, {"norm_before_residual": True}),
        )
    ]
    + [
        pytest.param(
            {"coverage": "drop", "normalisation": "token", "attention": "mla", **norms, "widths": widths},
            id=f"latent_{name}",
        )
        for name, widths, norms in (
            ("padded", "padded", {}),
            ("wide_values_own_embedding", "wide_values", {"hidden_size": 20}),
            ("even_both_norms", "even", {"fc_norm": True}),
        )
    ]
)


@pytest.mark.parametrize("options", CASES)
def test_loss_and_every_gradient_are_the_definitions(make_world: Callable[..., Any], options: dict[str, Any]) -> None:
    latent = "attention" in options
    config = CONFIG | ({"hidden_size": 20} if options.get("norm_before_residual") else {})
    if latent:
        config = LATENT | dict(zip(SIZE_NAMES, WIDTHS[options["widths"]], strict=True))
    ids = [n for n in range(300) if n % 5 != 2]
    given = {name: value for name, value in options.items() if name != "widths"}
    world = make_world(draft_config=config, ids_N=torch.tensor(ids), unroll=3, taps=(0, 3), **given)
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
    batch = world.assembled(rows, features)
    result = world.algorithm.run(world.draft, world.head, batch, world.device)
    (result.numerator / result.denominator).backward()

    params = {name: p.detach().clone().requires_grad_() for name, p in world.draft.named_parameters()}
    oracles = [
        (LatentOracle if latent else Oracle)(
            world, params, t.tolist(), [bool(v) for v in m], d, f.taps_TNH.flatten(1), f.last_TH
        )
        for t, m, d, f in zip(tokens, masks, documents, features, strict=True)
    ]
    want = expected_sums(oracles, 3, world.algorithm.options.step_decay, options["coverage"], ids)
    counted = [(a, b) for a, b in want.by_document.values() if b > 0]
    if options["normalisation"] == "token":
        loss = sum(a for a, _ in counted) / sum(b for _, b in counted)
    else:
        loss = sum(a / b for a, b in counted) / len(counted)
    loss.backward()

    assert sum(want.supervised) > 20
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
