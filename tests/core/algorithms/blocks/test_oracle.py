"""The training forward of DFlash against its definition, recomputed slot by slot in float64 (2602.06036, 2605.18810).

The oracle shares no code with the implementation: what a slot sees is a Python list of keys, supervision is looked up
token by token, the target's distribution is sliced out of a softmax over all V, and D-PACE's weights are nested loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core.features.rows import FeatureRows
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
MASK = 299
IDS = [n for n in range(300) if n % 5 != 2]


def rms(x: Tensor, weight: Tensor, eps: float = 1e-3) -> Tensor:
    return weight * x / ((x * x).sum() / x.numel() + eps).sqrt()


def rotate(x: Tensor, position: int) -> Tensor:
    """One head; entry d turns with entry d + D/2 by the angle position * theta ** (-2 d / D)."""
    half = HEAD_DIM // 2
    angles = [position * THETA ** (-2 * d / HEAD_DIM) for d in range(half)]
    cos, sin = (torch.tensor([f(angle) for angle in angles], dtype=torch.float64) for f in (math.cos, math.sin))
    return torch.cat((cos * x[:half] - sin * x[half:], sin * x[:half] + cos * x[half:]))


Keys = list[tuple[Tensor, Tensor]]  # of each key head, its key and value


@dataclass
class Row:
    """Tokens x, supervision m and documents d of one row, the target's taps g and last hidden states, its anchors."""

    x: list[int]
    m: list[bool]
    d: list[int]
    g: Tensor
    last: Tensor
    anchors: list[int] = field(default_factory=list)

    def eligible(self) -> list[int]:
        return [
            a for a in range(len(self.x) - 1) if self.m[a] and self.m[a + 1] and self.d[a] == self.d[a + 1]
        ]  # fmt: skip

    def position(self, j: int) -> int:
        return j - self.d.index(self.d[j])


@dataclass
class Oracle:
    """`kinds` of layers, window W and whether sliding layers are causal, block size b; `head` are the rows of the draft
    vocabulary of the `whole_head`."""

    params: dict[str, Tensor]
    embedding: Tensor
    whole_head: Tensor
    head: Tensor
    kinds: tuple[str, ...]
    window: int | None
    causal: bool
    size: int
    from_anchor: bool

    def keys(self, x: Tensor, layer: str, position: int) -> Keys:
        flat = [(self.params[f"{layer}.self_attn.{name}_proj.weight"] @ x).split(HEAD_DIM) for name in ("k", "v")]
        norm = self.params[f"{layer}.self_attn.k_norm.weight"]
        return [(rotate(rms(key, norm), position), value) for key, value in zip(*flat, strict=True)]

    def block(self, row: Row, a: int) -> list[Tensor]:
        """Logits of every slot."""
        w = self.params
        context = {j: rms(w["fc.weight"] @ row.g[j], w["hidden_norm.weight"]) for j in range(a) if row.d[j] == row.d[a]}
        xs = [self.embedding[row.x[a] if z == 0 else MASK] for z in range(self.size)]
        for n, kind in enumerate(self.kinds):
            xs = self.layer(f"layers.{n}", kind, row, a, context, xs)
        return [self.head @ rms(x, w["norm.weight"]) for x in xs]

    def layer(
        self, layer: str, kind: str, row: Row, a: int, context: dict[int, Tensor], xs: list[Tensor]
    ) -> list[Tensor]:
        w, first = self.params, row.position(a)
        normed = [rms(x, w[f"{layer}.input_layernorm.weight"]) for x in xs]
        far = {j: self.keys(c, layer, row.position(j)) for j, c in context.items()}
        near = {z: self.keys(n, layer, first + z) for z, n in enumerate(normed)}
        out = []
        for z, x in enumerate(xs):
            seen = [keys for j, keys in far.items() if kind == "full" or j > a + z - int(self.window or 0)]
            for other, keys in near.items():
                if kind == "full" or (other > z - int(self.window or 0) and (other <= z or not self.causal)):
                    seen.append(keys)
            query = (w[f"{layer}.self_attn.q_proj.weight"] @ normed[z]).split(HEAD_DIM)
            mixed = []
            for h, q in enumerate(query):
                q = rotate(rms(q, w[f"{layer}.self_attn.q_norm.weight"]), first + z)
                group = h // (len(query) // len(seen[0]))
                key = torch.stack([keys[group][0] for keys in seen])
                value = torch.stack([keys[group][1] for keys in seen])
                mixed.append((key @ q / math.sqrt(HEAD_DIM)).softmax(0) @ value)
            r = x + w[f"{layer}.self_attn.o_proj.weight"] @ torch.cat(mixed)
            n = rms(r, w[f"{layer}.post_attention_layernorm.weight"])
            gate, up = w[f"{layer}.mlp.gate_proj.weight"] @ n, w[f"{layer}.mlp.up_proj.weight"] @ n
            out.append(r + w[f"{layer}.mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up))
        return out


@dataclass(frozen=True)
class Pair:
    """A supervised step of a block: what each term costs, how much its target row counts, what is told of it."""

    document: int
    block: tuple[int, int]
    step: int
    cost: dict[str, Tensor]
    share: float
    alpha: float
    agrees: bool
    kl: float
    sayable: bool


def pair_of(
    oracle: Oracle, row: Row, block: tuple[int, int], s: int, logits: Tensor, ids: list[int], cover: str
) -> Pair:
    a = block[1]
    logq = logits.log_softmax(-1)
    q = logq.exp()
    full = (oracle.whole_head @ row.last[a + s]).softmax(-1)
    inside = full[ids]
    p, best = inside / inside.sum(), int(full.argmax())
    truth = row.x[a + 1 + s]
    alpha = torch.minimum(inside, q).sum()
    cost = {
        "cross_entropy": -(p * logq).sum(),
        "kl": (p * (p.log() - logq)).sum(),
        "reverse_kl": (q * (logq - p.log())).sum(),
        "tv": 1 - alpha,
        "ground_truth": -logq[ids.index(truth)] if truth in ids else torch.zeros(()).double(),
    }
    share = {"drop": float(best in ids), "renormalise": 1.0, "weight": float(inside.sum())}[cover]
    return Pair(
        row.d[a], block, s, cost, share, alpha.item(), ids[int(q.argmax())] == best, cost["kl"].item(), truth in ids
    )


def decayed(pairs: list[Pair], gamma: float) -> dict[tuple[tuple[int, int], int], float]:
    return {(pair.block, pair.step): math.exp(-pair.step / gamma) for pair in pairs}


def paced(pairs: list[Pair], steps: int, smoothing: float) -> dict[tuple[tuple[int, int], int], float]:
    """w_k = m_k sum_{j >= k} c_j m_j, c_j = prod_{i <= j} s_i, s_i = (1 - a) q_i + a, or 1 where nothing is taught."""
    found = {}
    by_place = {(pair.block, pair.step): pair for pair in pairs}
    for block, k in by_place:
        weight = 0.0
        for j in range(k, steps):
            if (block, j) not in by_place:
                continue
            chance = 1.0
            for i in range(j + 1):
                pair = by_place.get((block, i))
                if pair is not None:
                    q = math.exp(-float(pair.cost["ground_truth"])) if pair.sayable else 0.0
                    chance *= (1 - smoothing) * q + smoothing
            weight += chance
        found[block, k] = weight
    return found


def walk(rows: list[Row], hits: dict[tuple[int, int], int], steps: int, whole: set[int]) -> list[int]:
    """Tokens accepted in each round that decoding would take, in documents of which every anchor is known."""
    accepted = []
    for r, row in enumerate(rows):
        j = 0
        while j < len(row.x):
            if not row.m[j] or row.d[j] not in whole:
                j += 1
                continue
            end = j
            while end + 1 < len(row.x) and row.m[end + 1] and row.d[end + 1] == row.d[j]:
                end += 1
            # The first anchor is the span's first token, which the target says; a document's own is never predicted.
            anchor = j if j > 0 and row.d[j - 1] == row.d[j] else j + 1
            while anchor + steps <= end:
                accepted.append(hits[r, anchor])
                anchor += 1 + accepted[-1]
            j = end + 1
    return accepted


def geometry(**options: Any) -> Any:
    return {
        "layer_types": ("full", "full"),
        "block_size": 4,
        "num_layers": len(options.get("layer_types", "12")),
    } | options


SLIDING = {"layer_types": ("full", "sliding")}
TERMS = {"kl": 0.5, "tv": 0.7, "reverse_kl": 0.2, "ground_truth": 0.3}
CASES = {
    "plain": geometry(),
    "from anchor": geometry(sample_from_anchor=True),
    "narrow window": geometry(**SLIDING, sliding_window=2),
    "narrow window, non-causal": geometry(**SLIDING, sliding_window=3, sliding_window_non_causal=True),
    "wide window": geometry(layer_types=("sliding", "sliding", "full"), sliding_window=6),
    "wide window, non-causal, from anchor": geometry(
        **SLIDING, sliding_window=6, sliding_window_non_causal=True, sample_from_anchor=True
    ),
    "huge window": geometry(layer_types=("sliding",), sliding_window=500, block_size=5),
    "few anchors": geometry(num_anchors=2),
    "gamma": geometry(gamma=1.3),
    "terms, drop": geometry(objective=TERMS, pruned=True),
    "terms, renormalise": geometry(objective=TERMS, pruned=True, coverage="renormalise"),
    "terms, weight, per sequence": geometry(
        objective=TERMS, pruned=True, coverage="weight", normalisation="per_sequence", sample_from_anchor=True
    ),
    "dpace": geometry(weighting="dpace"),
    "dpace, pruned, from anchor": geometry(
        weighting="dpace", dpace_smoothing=0.2, pruned=True, coverage="weight", sample_from_anchor=True
    ),
    "dpace of other terms, per sequence": geometry(
        weighting="dpace", objective={"kl": 1.0}, normalisation="per_sequence", pruned=True
    ),
}
# Ragged rows; the first packs two documents, and supervision runs across their border.
DOCUMENTS = [[0] * 9 + [1] * 7, [2] * 9, [3] * 3, [4] * 2]
MASKS = [[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1], [0, 1]]


def rows_of(world: Any) -> tuple[FeatureRows, list[Row]]:
    """One micro-batch, and its rows for the oracle; the features hold normed states, since the target norms in fp32."""
    features, masks, packs, rows = [], [], [], []
    for seed, (documents, mask) in enumerate(zip(DOCUMENTS, MASKS, strict=True)):
        whole = world.features(world.tokens(len(documents), seed), seed, "post_norm")
        packs.append(sorted(set(documents)))
        for document in packs[-1]:
            where = torch.tensor([d == document for d in documents])
            part = world.features(whole.input_ids_T[where], seed, "post_norm")
            object.__setattr__(part, "taps_TNH", whole.taps_TNH[where])
            object.__setattr__(part, "last_TH", whole.last_TH[where])
            features.append(part)
            masks.append(torch.tensor(mask, dtype=torch.bool)[where])
        rows.append(
            Row(
                whole.input_ids_T.tolist(), [bool(v) for v in mask], documents, whole.taps_TNH.flatten(1), whole.last_TH
            )
        )
    return FeatureRows.of(features, masks, packs), rows


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_metrics_and_every_gradient_are_the_definitions(
    make_world: Callable[..., Any], case: dict[str, Any]
) -> None:
    options = dict(case)
    ids = IDS if options.pop("pruned", False) else list(range(300))
    world = make_world(draft_config=CONFIG, ids_N=torch.tensor(ids), taps=(0, 3), mask_token=MASK, **options)
    given, rows = rows_of(world)
    moment = Moment(draws=(5, 4, 3, 2, 1))
    batch = world.batch(given, moment)
    result = world.algorithm.run(world.draft, world.head, batch, world.device, moment=moment)
    (result.numerator / result.denominator).backward()

    for row, anchors, real in zip(rows, batch.blocks.anchor_BA.tolist(), batch.blocks.real_BA.tolist(), strict=True):
        row.anchors = [a for a, kept in zip(anchors, real, strict=True) if kept]
    if "num_anchors" not in options:
        assert [row.anchors for row in rows] == [row.eligible() for row in rows]
    params = {name: p.detach().clone().requires_grad_() for name, p in world.draft.named_parameters()}
    oracle = Oracle(
        params,
        world.head.embedding_VH,
        world.head.head_VH,
        world.head.head_VH[ids],
        options["layer_types"],
        options.get("sliding_window"),
        not options.get("sliding_window_non_causal", False),
        options["block_size"],
        options.get("sample_from_anchor", False),
    )
    steps = oracle.size - (not oracle.from_anchor)
    cover = options.get("coverage", "drop")
    pairs, hits = [], {}
    for r, row in enumerate(rows):
        for a in row.anchors:
            logits = oracle.block(row, a)[oracle.size - steps :]
            found = [
                pair_of(oracle, row, (r, a), s, logits[s], ids, cover)
                for s in range(steps)
                if a + 1 + s < len(row.x) and row.m[a + 1 + s] and row.d[a + 1 + s] == row.d[a]
            ]
            pairs += found
            right = {pair.step for pair in found if pair.agrees}
            hits[r, a] = next((s for s in range(steps) if s not in right), steps)

    gamma = options.get("gamma", 7 * oracle.size / 16)
    is_paced = options.get("weighting") == "dpace"
    weight = paced(pairs, steps, options.get("dpace_smoothing", 0.5)) if is_paced else decayed(pairs, gamma)
    objective = options.get("objective", {"ground_truth": 1.0})
    by_document: dict[int, list[Any]] = {}
    for pair in pairs:
        sums = by_document.setdefault(pair.document, [0.0, 0.0])
        cost = sum(share * pair.cost[term] for term, share in objective.items())
        sums[0] = sums[0] + weight[pair.block, pair.step] * pair.share * cost
        sums[1] += pair.share * (1.0 if is_paced else weight[pair.block, pair.step])
    counted = [(over, under) for over, under in by_document.values() if under > 0]
    if options.get("normalisation") == "per_sequence":
        loss = sum(over / under for over, under in counted) / len(counted)
    else:
        loss = sum(over for over, _ in counted) / sum(under for _, under in counted)
    loss.backward()

    assert (result.numerator / result.denominator).item() == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in world.draft.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, params[name].grad, rtol=1e-9, atol=1e-13, msg=name)

    def per_step(value: Callable[[Pair], float]) -> list[float]:
        return [sum(value(pair) for pair in pairs if pair.step == s) for s in range(steps)]

    sums = result.sums
    assert sums["supervised"].tolist() == per_step(lambda pair: 1)
    assert sums["correct"].tolist() == per_step(lambda pair: pair.agrees)
    assert sums["counted"].tolist() == pytest.approx(per_step(lambda pair: pair.share), rel=1e-12)
    assert sums["alpha"].tolist() == pytest.approx(per_step(lambda pair: pair.alpha), rel=1e-12)
    kl = (sums["cross_entropy"] - sums["entropy"]).tolist()
    assert kl == pytest.approx(per_step(lambda pair: pair.share * pair.kl), rel=1e-10)
    whole = {d for row in rows for d in row.d if {a for a in row.eligible() if row.d[a] == d} <= set(row.anchors)}
    accepted = walk(rows, hits, steps, whole)
    assert int(sums["walk_rounds"]) == len(accepted)
    assert sums["walk_hits"].tolist() == [sum(count > s for count in accepted) for s in range(steps)]
    inside = {
        place: count
        for place, count in hits.items()
        if sum(pair.block == place for pair in pairs) == steps and rows[place[0]].position(place[1]) > 0
    }
    assert int(sums["whole_slots"]) == len(inside)
    assert sums["whole_hits"].tolist() == [sum(count > s for count in inside.values()) for s in range(steps)]
    assert int(sums["tokens"]) == sum(map(len, DOCUMENTS))
