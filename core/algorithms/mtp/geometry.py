"""The sizes of a multi-token-prediction head and its family: read from the target's checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from torchspec.core.algorithms.mtp.families import FAMILIES, Family, family_of
from torchspec.core.algorithms.mtp.options import MtpOptions
from torchspec.core.errors import ConfigError, Problem, TargetError
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.geometry import SIZES, LayerGeometry
from torchspec.core.models.layers import llama_rope
from torchspec.core.models.target_spec import load_target_config
from torchspec.core.models.target_weights import TargetWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL_TYPES = ("llama", "mimo", "qwen2", "qwen3")
"""Targets whose decoder layers are the dense ones that this head has: whole heads rotated, RMS norms, gated SiLU."""

SHOWN = 3
"""Names listed of tensors that are too many or too few."""


@dataclass(frozen=True, kw_only=True)
class Geometry(LayerGeometry):
    """Everything that fixes the head's parameters and arithmetic, beside the weights."""

    vocab_size: int
    family: str
    qk_norm: bool
    qkv_bias: bool

    @property
    def rules(self) -> Family:
        return FAMILIES[self.family]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by our names."""
        from torchspec.core.algorithms.mtp.model import MtpDraft

        with torch.device("meta"):
            draft = MtpDraft(self)
        return {name: tuple(parameter.shape) for name, parameter in draft.named_parameters()}


def derive(options: MtpOptions, target: TargetSpec) -> Geometry:
    """Of the head in the target's checkpoint, or of a fresh one with a layer of the target's kind.

    Raises ConfigError with everything that does not fit: a target whose layers are of another kind, one without a head
    or with several, tensors that are missing, unknown or misshapen.
    """
    problems = [*options.idle_problems(), *_layer_problems(target)]
    try:
        weights = TargetWeights.open(target.path)
    except TargetError as error:
        raise ConfigError([*problems, Problem(field="target.path", message=str(error))]) from error
    family = _family(options, target, weights.files, problems)
    if problems:
        raise ConfigError(problems)
    assert family is not None
    fresh = options.init == "random"
    names = _last_layer(weights.files, target) if fresh else family.head_names(weights.files, target.num_layers)
    geometry = geometry_of(target, family, names)
    problems = _rotary_problems(geometry)
    if not fresh and not problems:
        problems = _tensor_problems(geometry, target, weights)
    if problems:
        raise ConfigError(problems)
    return geometry


def geometry_of(target: TargetSpec, family: Family, names: Iterable[str]) -> Geometry:
    """Sizes are the target's, as engines have them too; the stored `names` tell biases and norms of heads."""
    kept = tuple(names)
    return Geometry(
        **{name: getattr(target, name) for name in SIZES},
        vocab_size=target.vocab_size,
        rms_norm_eps=target.rms_norm_eps,
        rope_parameters=llama_rope(target.rope_parameters),
        max_position_embeddings=target.max_position_embeddings,
        family=family.name,
        qk_norm=any(name.endswith("self_attn.q_norm.weight") for name in kept),
        qkv_bias=any(name.endswith("self_attn.q_proj.bias") for name in kept),
    )


def _layer_problems(target: TargetSpec) -> list[Problem]:
    def problem(value: object, message: str) -> Problem:
        return Problem(field="target.path", value=value, message=message)

    if target.model_type not in MODEL_TYPES:
        kinds = ", ".join(MODEL_TYPES)
        message = f"its heads are not trained by mtp, which knows dense layers with grouped queries alone: {kinds}"
        return [problem(f"model_type {target.model_type!r}", message)]
    config: PreTrainedConfig = load_target_config(target.path, trust_remote_code=target.trust_remote_code)
    text = config.get_text_config(decoder=True)
    expected: Mapping[str, tuple[object, ...]] = {
        "hidden_act": ("silu", None),
        "use_sliding_window": (False, None),
        "partial_rotary_factor": (1.0, None),
    }
    found = []
    for name, fits in expected.items():
        value = getattr(text, name, None)
        if value not in fits:
            found.append(problem(f"{name} {value!r}", f"a head trained by mtp has a layer with {name} {fits[0]!r}"))
    return found


def _family(options: MtpOptions, target: TargetSpec, stored: Iterable[str], problems: list[Problem]) -> Family | None:
    names = tuple(stored)
    if options.init == "random":
        return FAMILIES[options.family or "mimo"]
    family = family_of(names, target.num_layers)
    if family is None:
        looked = ", ".join(f.stored("input_proj.weight", target.num_layers) for f in FAMILIES.values())
        problems.append(
            Problem(
                field="draft.init",
                value="target",
                message=f"{target.path} holds no multi-token-prediction head to fine-tune; looked for {looked}",
                remedy="give the checkpoint as it was published (transformers drops the head when it saves a model), "
                "or train a fresh head with draft.init=random",
            )
        )
    elif options.family not in (None, family.name):
        problems.append(
            Problem(
                field="draft.family",
                value=options.family,
                message=f"the target's head is stored as {family.name}",
                remedy="leave draft.family out, or train a fresh head with draft.init=random",
            )
        )
    if family is not None and family.has_more(names, target.num_layers):
        problems.append(
            Problem(
                field="target.path",
                value=str(target.path),
                message="it holds several heads, one for each token ahead; mtp trains a single one that is applied to "
                "its own output",
            )
        )
    return family


def _rotary_problems(geometry: Geometry) -> list[Problem]:
    try:
        geometry.rotary()
    except (ValueError, KeyError) as error:
        rope = geometry.rope_parameters
        return [Problem(field="target.path", value=rope, message=f"rotary embedding: {error}")]
    return []


def _last_layer(stored: Iterable[str], target: TargetSpec) -> list[str]:
    """The names of the target's last decoder layer, whatever stands before them."""
    return [name for name in stored if f"layers.{target.num_layers - 1}." in name and "mtp" not in name]


def _tensor_problems(geometry: Geometry, target: TargetSpec, weights: TargetWeights) -> list[Problem]:
    """Where the stored head is another than `geometry` says."""
    family, layers = geometry.rules, target.num_layers
    wanted = {family.stored(name, layers): shape for name, shape in geometry.shapes.items()}
    copies = {family.prefix.format(n=layers) + name for name in family.copies}
    held = set(family.head_names(weights.files, layers)) - copies
    found = []

    def listed(names: Iterable[str]) -> str:
        ordered = sorted(names)
        return ", ".join(ordered[:SHOWN]) + (f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else "")

    if held - wanted.keys():
        found.append(
            f"its head is no dense layer with grouped queries, the only kind that mtp trains: it also holds "
            f"{listed(held - wanted.keys())}"
        )
    if wanted.keys() - held:
        found.append(f"its head lacks {listed(wanted.keys() - held)}")
    wrong = [name for name in held & wanted.keys() if weights.shape(name) != wanted[name]]
    if wrong:
        shapes = (f"{name} is {list(weights.shape(name))}, expected {list(wanted[name])}" for name in wrong)
        found.append(f"its head has other sizes than its layers: {listed(shapes)}")
    return [Problem(field="target.path", value=str(target.path), message=message) for message in found]
