"""The terms of an objective as users name and weigh them, and what they weigh at a moment of a training.

Shape letters: M supervised pairs, grouped by step; K steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchspec.core.config.schema import Section
from torchspec.core.errors import Problem
from torchspec.core.interfaces.algorithm import Moment
from torchspec.core.ops.distillation import LOG_TERMS

Term = Literal[
    "cross_entropy", "kl", "reverse_kl", "jsd", "tv", "lk_alpha", "lk_lambda", "argmax", "ground_truth"
]  # fmt: skip
"""`lk_lambda` is made of `kl` and `tv`; the others are those of `distillation.TERMS`."""

ALPHA_SUMS = ("alpha", "supervised")
"""Per-step sums of a window from which `lk_lambda` knows how often a step's tokens are accepted."""


class Course(Section):
    """A number that changes linearly with the steps of a training and then stays."""

    start: float = Field(ge=0, description="weight at the first step")
    end: float = Field(ge=0, description="weight from `until` on")
    until: float = Field(1.0, gt=0, le=1, description="share of all steps after which it stays at `end`")

    def at(self, progress: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, progress / self.until)


class Ramp(Course):
    """The weight of a term, which must count at some time."""

    @model_validator(mode="after")
    def _weighs_something(self) -> Self:
        if self.start == self.end == 0:
            raise ValueError("start and end are both 0: the term would never count, leave it out")
        return self


Weight = Annotated[float, Field(gt=0)] | Ramp


class ObjectiveOptions(Section):
    """The part of an algorithm's options that says what its pairs are taught."""

    objective: dict[Term, Weight] = Field(
        {"cross_entropy": 1.0},
        min_length=1,
        description="terms of the loss and their weights, each a number or {start, end, until} (linear in the steps "
        "done, until that share of them): kl or cross_entropy (the same gradient), reverse_kl, jsd, tv, lk_alpha, "
        "lk_lambda (2602.23881: kl where few tokens are accepted, tv where many are), argmax (cross-entropy to the "
        "target's first choice among the tokens the draft can say), ground_truth (to the text; a token the draft "
        "cannot say adds nothing but is counted)",
    )
    lk_eta: float = Field(
        3.0,
        gt=0,
        description="lk_lambda: kl weighs exp(-lk_eta x a), tv the rest; a: the position's mean acceptance probability",
    )
    coverage: Literal["drop", "renormalise", "weight"] = Field(
        "drop",
        description="slots whose target argmax is outside the draft vocabulary: left out, kept on the "
        "renormalised teacher, or all slots weighted by the teacher mass inside",
    )
    normalisation: Literal["token", "per_sequence"] = Field(
        "token", description="mean over counted slots of the whole optimizer window, or of each sequence first"
    )

    def idle(self) -> Iterator[tuple[str, str]]:
        """Options that change nothing beside the others, and beside which; an algorithm adds its own."""
        if "lk_lambda" not in self.objective:
            yield "lk_eta", "without lk_lambda in draft.objective"

    def idle_problems(self) -> list[Problem]:
        """Of `idle`, those that somebody gave a value of its own."""
        return [
            Problem(
                field=f"draft.{name}", value=getattr(self, name), message=f"means nothing {why}", remedy="leave it out"
            )
            for name, why in self.idle()
            if getattr(self, name) != type(self).model_fields[name].default
        ]

    @property
    def remembers(self) -> tuple[str, ...]:
        """See `Algorithm.remembers`."""
        return ALPHA_SUMS if "lk_lambda" in self.objective else ()

    @property
    def with_logs(self) -> bool:
        """Whether the teacher must keep log-probabilities."""
        return not LOG_TERMS.isdisjoint(self.objective)


def term_weights(
    options: ObjectiveOptions, moment: Moment, sizes: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> dict[str, float | Tensor]:
    """What each of `distillation.TERMS` weighs now, for all pairs or for each of the `sizes[k]` pairs of step k, [M].

    lk_lambda of weight w is w lambda_k KL + w (1 - lambda_k) TV with lambda_k = exp(-eta mean alpha_k), the mean over
    the supervised pairs of the window before, of all ranks: a constant, so that accumulating gradients does not change
    them. Before the first window alpha is 0, and lk_lambda is KL.
    """
    weights: dict[str, float | Tensor] = {}

    def add(name: str, weight: float | Tensor) -> None:
        weights[name] = weights[name] + weight if name in weights else weight

    for term, given in options.objective.items():
        weight = given.at(moment.progress) if isinstance(given, Ramp) else given
        if term != "lk_lambda":
            add(str(term), weight)
            continue
        lambda_K = torch.exp(-options.lk_eta * mean_alpha(moment.previous, len(sizes)))
        lambda_M = torch.cat(
            [torch.full((n,), x, dtype=dtype, device=device) for n, x in zip(sizes, lambda_K.tolist(), strict=True)]
        )
        add("kl", weight * lambda_M)
        add("tv", weight * (1 - lambda_M))
    return weights


def mean_alpha(previous: Mapping[str, Tensor] | None, steps: int) -> Tensor:
    """Of each step, [K] in float64; 0 where nothing was supervised."""
    if previous is None:
        return torch.zeros(steps, dtype=torch.float64)
    alpha_K, pairs_K = (previous[name].double() for name in ALPHA_SUMS)
    return torch.where(pairs_K > 0, alpha_K / pairs_K.clamp_min(1), 0.0)
