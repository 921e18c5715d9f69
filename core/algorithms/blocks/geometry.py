"""The sizes of a draft of blocks: derived from the target, from a draft config.json, or given one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchspec.core.algorithms.blocks.batch import BlockShape
from torchspec.core.algorithms.blocks.options import BlockOptions
from torchspec.core.attention.block import BlockMask
from torchspec.core.errors import ConfigError, Problem
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.geometry import LayerGeometry, Sources, layer_problems

PUBLISHED_TAPS = 5
MOST_SLOTS = 254
"""How many of its tokens were accepted travels, with one more, in a byte."""


@dataclass(frozen=True, kw_only=True)
class BlockGeometry(LayerGeometry):
    """Everything that fixes the draft's parameters and arithmetic, beside the weights."""

    layer_types: tuple[str, ...]
    sliding_window: int | None
    sliding_window_non_causal: bool
    block_size: int
    mask_token: int
    sample_from_anchor: bool
    draft_vocab_size: int
    vocab_size: int
    target_hidden_size: int
    num_taps: int

    @property
    def block(self) -> BlockShape:
        return BlockShape(size=self.block_size, mask_token=self.mask_token, sample_from_anchor=self.sample_from_anchor)

    def mask_of(self, kind: str) -> BlockMask:
        """What the slots see in layers of this kind: "full" or "sliding"."""
        if kind == "full":
            return BlockMask(size=self.block_size)
        return BlockMask(size=self.block_size, causal=not self.sliding_window_non_causal, window=self.sliding_window)


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Five layers, as the published drafts have them."""
    return spread_taps(PUBLISHED_TAPS, num_layers)


def spread_taps(count: int, num_layers: int) -> tuple[int, ...]:
    """So many layers, evenly from the second to the third last; a single one in the middle."""
    if count == 1:
        return (num_layers // 2,)
    last = num_layers - 3
    return tuple(round(1 + place * (last - 1) / (count - 1)) for place in range(count))


def derive(
    options: BlockOptions, target: TargetSpec, stated: Mapping[str, Any]
) -> tuple[BlockGeometry, tuple[int, ...]]:
    """The draft's geometry and taps. Raises ConfigError with every misfit of options, draft config and target.

    `stated` are the fields of a draft config already read (`files.stated_fields`).
    """
    problems: list[Problem] = []
    sources = Sources(options=options, stated=stated, target=target, problems=problems)
    taps = sources.taps(options.taps, default_taps(target.num_layers))
    window = sources.pick("sliding_window", None)
    layers = sources.pick("num_layers", options.num_layers)
    kinds = sources.pick("layer_types", ("full" if window is None else "sliding",) * layers)
    size = sources.pick("block_size", options.block_size)
    geometry = BlockGeometry(
        **sources.layer(),
        layer_types=tuple(kinds),
        sliding_window=window,
        sliding_window_non_causal=sources.pick("sliding_window_non_causal", options.sliding_window_non_causal),
        block_size=size,
        mask_token=sources.pick("mask_token", target.vocab_size - 1),
        sample_from_anchor=sources.pick("sample_from_anchor", options.sample_from_anchor),
        draft_vocab_size=sources.pick("draft_vocab_size", target.vocab_size, option="vocab_size"),
        vocab_size=stated.get("vocab_size", target.vocab_size),
        target_hidden_size=stated.get("target_hidden_size", target.hidden_size),
        num_taps=len(taps),
    )
    problems += options.idle_problems()
    problems += layer_problems(geometry)
    problems += _problems(geometry, target, layers, stated)
    if problems:
        raise ConfigError(problems)
    return geometry, taps


def _problems(geometry: BlockGeometry, target: TargetSpec, layers: int, stated: Mapping[str, Any]) -> list[Problem]:
    problems = []

    def check(wrong: bool, field: str, value: object, message: str, remedy: str = "") -> None:
        if wrong:
            problems.append(Problem(field=field, value=value, message=message, remedy=remedy))

    made_for = "take a draft that was made for this target"
    for name, wanted in (("hidden_size", target.hidden_size), ("target_hidden_size", target.hidden_size),
                         ("vocab_size", target.vocab_size)):  # fmt: skip
        value = getattr(geometry, name)
        check(value != wanted, "draft.config", value, f"its {name} must be the target's, {wanted}", made_for)
    check(
        geometry.draft_vocab_size > target.vocab_size,
        "draft.vocab_size",
        geometry.draft_vocab_size,
        f"the draft cannot have more tokens than the target's {target.vocab_size}",
    )
    check(
        geometry.mask_token >= target.vocab_size,
        "draft.mask_token",
        geometry.mask_token,
        f"the target's tokens end at {target.vocab_size - 1}",
    )
    check(
        not 2 <= geometry.block_size <= MOST_SLOTS,
        "draft.block_size",
        geometry.block_size,
        f"a block has 2 to {MOST_SLOTS} slots",
    )
    kinds = geometry.layer_types
    check(
        len(kinds) != layers,
        "draft.layer_types",
        list(kinds),
        f"{len(kinds)} kinds for {layers} layers",
        "name one for each layer, or set draft.num_layers",
    )
    check(
        "sliding" in kinds and geometry.sliding_window is None,
        "draft.sliding_window",
        None,
        "sliding layers need a window",
        "draft.sliding_window=2048, or layer_types of full",
    )
    check(
        "sliding" not in kinds and geometry.sliding_window is not None,
        "draft.sliding_window",
        geometry.sliding_window,
        "no layer slides",
        "leave it out, or name sliding layers in draft.layer_types",
    )
    check(
        "sliding" not in kinds and geometry.sliding_window_non_causal,
        "draft.sliding_window_non_causal",
        True,
        "no layer slides",
        "leave it out, or give draft.sliding_window",
    )
    check(
        "num_taps" in stated and stated["num_taps"] != geometry.num_taps,
        "draft.taps",
        geometry.num_taps,
        f"the draft config is for {stated.get('num_taps')} taps",
        "give as many taps as it names",
    )
    return problems
