"""Cases of log-probabilities and entropies: whole, each rank's part, and the definition in float64. Loaded by path.

Shape letters: N tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.core.interfaces.device import FusedOps
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.objectives import LogProbabilities, hidden_log_probabilities, token_log_probabilities

V, H = 61, 7  # no multiples of anything
IGNORED = -100
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
ROUNDING = {"logits": 1.01 * 2.0**-8, "hidden": 2.0**-7}
"""Of bfloat16: outputs are fp32 sums of the given numbers, gradients are rounded once, to half a unit in the last
place. Those from hidden states also come from rounded gradients of the logits, whose errors partly cancel in sums."""
SIZES = {1: (61,), 2: (20, 41), 3: (33, 5, 23)}


class SmallOps(FusedOps):
    """Slices of two rows of fp32, one of fp64."""

    temporary_bytes = 2 * 4 * V


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`absent`: no token is in the last rank's part. `empty`: the second of several ranks has none of the vocabulary.
    `masked`: logits of -inf, in some rows those of the whole first part. `ignored`: every third token does not count,
    or all do not. `frozen`: leaves that want no gradient."""

    name: str
    form: str = "logits"
    dtype: torch.dtype = torch.float64
    tokens: int = 11
    entropy: bool = True
    temperature: float = 1.0
    ignored: str = "none"
    bias: bool = False
    frozen: Sequence[str] = ()
    masked: bool = False
    absent: bool = False
    empty: bool = False
    scale: float = 1.0
    budget: int | None = None

    def sizes(self, ranks: int) -> tuple[int, ...]:
        if not self.empty or ranks == 1:
            return SIZES[ranks]
        first, second, *rest = SIZES[ranks]
        return (first + second, 0, *rest)


def cells() -> list[Cell]:
    """What ranks are put through."""
    made = []
    for form in ("logits", "hidden"):
        for entropy in (True, False):
            name = f"{form}-{'entropy' if entropy else 'plain'}"
            given = {"form": form, "entropy": entropy, "temperature": 0.7}
            made += [
                Cell(name=name, ignored="some", bias=True, **given),
                Cell(name=f"{name}-absent", absent=True, **given),
                Cell(name=f"{name}-empty", empty=True, bias=True, **given),
                Cell(name=f"{name}-nothing", tokens=0, **given),
                Cell(name=f"{name}-all-ignored", ignored="all", **given),
                Cell(name=f"{name}-fp32", dtype=torch.float32, scale=10.0, ignored="some", **given),
                Cell(name=f"{name}-bf16", dtype=torch.bfloat16, **given),
                Cell(name=f"{name}-many", tokens=300, budget=1, **given),
            ]
        made.append(Cell(name=f"{form}-masked", form=form, masked=True, bias=form == "hidden"))
    for frozen in (("hidden",), ("weight",), ("hidden", "bias")):
        made.append(
            Cell(name=f"frozen-{'-'.join(frozen)}", form="hidden", tokens=300, bias=True, frozen=frozen, budget=1)
        )
    return made


@dataclass(frozen=True, kw_only=True)
class Case:
    """A cell's tensors, leaves of autograd by name; `slopes` are the gradients of the two outputs."""

    cell: Cell
    leaves: dict[str, Tensor]
    tokens_N: Tensor
    slopes_2N: Tensor

    @classmethod
    def random(cls, cell: Cell) -> Case:
        generator = torch.Generator().manual_seed(cell.tokens)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tokens_N = torch.randint(0, SIZES[2][0] if cell.absent else V, (cell.tokens,), generator=generator)
        values = {"logits": cell.scale * random(cell.tokens, V)}
        if cell.form == "hidden":
            values = {"hidden": cell.scale * random(cell.tokens, H), "weight": random(V, H)}
            if cell.bias:
                values["bias"] = random(V)
        if cell.masked and cell.form == "logits":
            values["logits"][::2, : SIZES[3][0]] = -torch.inf
            tokens_N[::2] = V - 1 - tokens_N[::2] % 28
        elif cell.masked:
            values["bias"][::5] = -torch.inf
            tokens_N -= (tokens_N % 5 == 0).long()
            tokens_N[tokens_N < 0] = 1
        if cell.ignored == "some":
            tokens_N[::3] = IGNORED
        elif cell.ignored == "all":
            tokens_N[:] = IGNORED
        slopes_2N = random(2, cell.tokens)
        leaves = {name: value.to(cell.dtype).requires_grad_(name not in cell.frozen) for name, value in values.items()}
        return cls(cell=cell, leaves=leaves, tokens_N=tokens_N, slopes_2N=slopes_2N)

    def part(self, shards: VocabularyShards) -> Case:
        """One rank's."""
        sizes = self.cell.sizes(shards.size)
        first = sum(sizes[: shards.rank])
        last, leaves = first + sizes[shards.rank], {}
        for name, value in self.leaves.items():
            whole = value.detach()
            own = whole[:, first:last] if name == "logits" else whole if name == "hidden" else whole[first:last]
            leaves[name] = own.clone().requires_grad_(value.requires_grad)
        return Case(cell=self.cell, leaves=leaves, tokens_N=self.tokens_N, slopes_2N=self.slopes_2N)

    def find(self, ops: FusedOps | None = None, shards: VocabularyShards | None = None) -> LogProbabilities:
        ops, cell, leaves = SmallOps() if ops is None else ops, self.cell, self.leaves
        how = {"shards": shards, "entropy": cell.entropy, "temperature": cell.temperature}
        if cell.form == "logits":
            return token_log_probabilities(leaves["logits"], self.tokens_N, ops, **how)
        return hidden_log_probabilities(
            leaves["hidden"], leaves["weight"], self.tokens_N, ops, bias_V=leaves.get("bias"), budget=cell.budget, **how
        )

    def loss(self, log_probability_N: Tensor, entropy_N: Tensor | None) -> Tensor:
        """Both outputs in one scalar."""
        slopes_2N = self.slopes_2N.to(log_probability_N.dtype)
        total = torch.dot(slopes_2N[0], log_probability_N)
        return total if entropy_N is None else total + torch.dot(slopes_2N[1], entropy_N)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        wanted = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

    def ours(self, shards: VocabularyShards | None = None, ops: FusedOps | None = None) -> dict[str, Tensor]:
        """Outputs, and gradients of the loss by the leaves' names."""
        found = self.find(ops, shards)
        outputs = {"log_probability": found.log_probability_N.detach()}
        if found.entropy_N is not None:
            outputs["entropy"] = found.entropy_N.detach()
        return outputs | self.gradients(self.loss(found.log_probability_N, found.entropy_N))

    def defined(self) -> dict[str, Tensor]:
        """The same from the definition, in float64, a row at a time over the tokens that have a chance at all."""
        exact = {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in self.leaves.items()}
        case = Case(cell=self.cell, leaves=exact, tokens_N=self.tokens_N, slopes_2N=self.slopes_2N)
        if self.cell.form == "logits":
            logits_NV = exact["logits"]
        else:
            logits_NV = exact["hidden"] @ exact["weight"].T
            if "bias" in exact:
                logits_NV = logits_NV + exact["bias"]
        none = logits_NV.new_zeros(())
        found = [self._of_row(*row) if row[1] != IGNORED else (none, none)
                 for row in zip(logits_NV, self.tokens_N.tolist(), strict=True)]  # fmt: skip
        outputs = {"log_probability": torch.stack([none, *(row[0] for row in found)])[1:]}
        if self.cell.entropy:
            outputs["entropy"] = torch.stack([none, *(row[1] for row in found)])[1:]
        loss = case.loss(outputs["log_probability"], outputs.get("entropy"))
        for leaf in exact.values():  # all have a gradient, of zeros if no token counts
            loss = loss + 0.0 * leaf.masked_fill(leaf.isinf(), 0.0).sum()
        return {name: value.detach() for name, value in outputs.items()} | case.gradients(loss)

    def _of_row(self, logits_V: Tensor, token: int) -> tuple[Tensor, Tensor]:
        possible_V = logits_V > -torch.inf
        assert possible_V[token]
        z = logits_V[possible_V] / self.cell.temperature
        weight = (z - z.max().detach()).exp()
        p = weight / weight.sum()
        return p[int(possible_V[:token].sum())].log(), -(p * p.log()).sum()


def compare_rounded(case: Case, got: dict[str, Tensor], name: str = "") -> None:
    """Of bfloat16, with the definition."""
    for key, exact in case.defined().items():
        output = key not in case.leaves
        assert got[key].dtype == (torch.float32 if output else torch.bfloat16)
        tolerance = TOLERANCE[torch.float32] if output else ROUNDING[case.cell.form]
        compare({key: got[key]}, {key: exact}, tolerance, name)


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, name: str = "") -> None:
    """Each tensor to `tolerance` of its largest entry (or of 1), and every entry finite where that of `want` is."""
    assert got.keys() == want.keys()
    for key, exact in want.items():
        scale = max(1.0, exact[exact.isfinite()].abs().max().item()) if exact.numel() else 1.0
        torch.testing.assert_close(
            got[key].double(), exact, rtol=0, atol=tolerance * scale, msg=lambda text, key=key: f"{name} {key}: {text}"
        )
