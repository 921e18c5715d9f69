"""The sizes of a Llama-style draft layer and the target's layers that a draft taps: derived and checked.

A size comes from the options, else from a draft config.json, else from the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from torchspec.core.errors import Problem
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.layers import Rotary, llama_rope

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Fields of the geometry that are options of the same name, and for which the target's own size is the default."""


@dataclass(frozen=True, kw_only=True)
class LayerGeometry:
    """What fixes the parameters and the arithmetic of a Llama-style layer, beside the weights."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict[str, object]
    max_position_embeddings: int

    def rotary(self) -> Rotary:
        """Raises ValueError or KeyError for rope parameters of no supported kind."""
        return Rotary.from_parameters(self.rope_parameters, self.head_dim, self.max_position_embeddings)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a draft's fields come from; what is wrong with them is added to `problems`.

    options   the `draft` section
    stated    fields that a draft config.json states, by the geometry's names, and perhaps `taps`
    """

    options: BaseModel
    stated: Mapping[str, Any]
    target: TargetSpec
    problems: list[Problem]

    def pick(self, name: str, default: Any, *, option: str | None = None) -> Any:
        """A field of the geometry whose option is called `option`. Options and config must not contradict."""
        option = option or name
        explicit = getattr(self.options, option) if option in self.options.model_fields_set else None
        if explicit is None:
            return self.stated.get(name, default)
        if name in self.stated and self.stated[name] != explicit:
            self.problems.append(
                Problem(
                    field=f"draft.{option}",
                    value=explicit,
                    message=f"{self._whose} says {self.stated[name]}",
                    remedy="give it in one place",
                )
            )
        return explicit

    @property
    def _whose(self) -> str:
        config, start = (getattr(self.options, name, None) for name in ("config", "init_from"))
        own = start is not None and config in (start / "config.json", start / "draft" / "config.json")
        return "the draft in draft.init_from" if own else "the draft config"

    def layer(self) -> dict[str, Any]:
        """The fields of `LayerGeometry`."""
        target, stated = self.target, self.stated
        return {name: self.pick(name, getattr(target, name)) for name in SIZES} | {
            "rms_norm_eps": stated.get("rms_norm_eps", target.rms_norm_eps),
            "rope_parameters": stated.get("rope_parameters", _drafts_rope(target.rope_parameters)),
            "max_position_embeddings": stated.get("max_position_embeddings", target.max_position_embeddings),
        }

    def taps(self, listed: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
        """The tapped layers, 0-based: the option `taps` (given as `listed`), else the config's, else the default.

        They must be layers of the target, each once and ascending; the default may not fit a shallow target.
        """
        layers = self.target.num_layers
        source = "draft.config" if listed is None else "draft.taps"
        chosen = self.stated.get("taps") if listed is None else listed
        if chosen is None:
            taps = tuple(default)
            if not _ascend(taps) or not all(0 <= tap < layers for tap in taps):
                self.problems.append(
                    Problem(
                        field="draft.taps",
                        message=f"the default taps {list(taps)} collide on a target of {layers} layers",
                        remedy=f"name the layers to read, 0-based and below {layers}, "
                        f"such as draft.taps=[{layers - 1}]",
                    )
                )
            return taps
        taps = tuple(chosen)
        outside = [tap for tap in taps if not 0 <= tap < layers]
        if outside:
            self.problems.append(
                Problem(
                    field=source,
                    value=taps,
                    message=f"the target has the layers 0 to {layers - 1}, and not {', '.join(map(str, outside))}",
                )
            )
        if not taps:
            self.problems.append(Problem(field=source, value=taps, message="at least one tap is needed"))
        elif not _ascend(taps):
            self.problems.append(
                Problem(
                    field=source,
                    value=taps,
                    message="taps must be different layers in ascending order, the order in which engines hand them "
                    "over",
                    remedy=f"draft.taps={sorted(set(taps))}",
                )
            )
        return taps


def _drafts_rope(of_target: Mapping[str, object]) -> dict[str, object]:
    """As `llama_rope`, but a draft turns whole heads where the target is `proportional` (Gemma-4), at the same base."""
    rope = llama_rope(of_target)
    return (
        {"rope_type": "default", "rope_theta": rope["rope_theta"]} if rope.get("rope_type") == "proportional" else rope
    )


def layer_problems(geometry: LayerGeometry) -> list[Problem]:
    """Everything about a layer's sizes that could not be computed with."""
    problems = []
    heads, kv_heads, width = geometry.num_attention_heads, geometry.num_key_value_heads, geometry.head_dim
    if heads % kv_heads:
        problems.append(
            Problem(
                field="draft.num_key_value_heads", value=kv_heads, message=f"must divide the {heads} attention heads"
            )
        )
    if width % 2:
        problems.append(
            Problem(field="draft.head_dim", value=width, message="must be even: rotary embedding turns pairs")
        )
    rope = geometry.rope_parameters
    if "rope_theta" not in rope:
        message = "no single rope_theta is known for the draft"
        remedy = "give a draft config.json with rope_parameters"
        return [*problems, Problem(field="draft.config", value=rope, message=message, remedy=remedy)]
    try:
        # An odd width is reported above.
        Rotary.from_parameters(rope, width + width % 2, geometry.max_position_embeddings)
    except (ValueError, KeyError) as error:
        message = f"rotary embedding: {error}"
        remedy = "give a draft config.json with rope_parameters of a supported kind"
        problems.append(Problem(field="draft.config", value=rope, message=message, remedy=remedy))
    return problems


def _ascend(taps: Sequence[int]) -> bool:
    return list(taps) == sorted(set(taps))
