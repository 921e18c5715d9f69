"""How a target is split over ranks: heads, feed-forward columns and vocabulary rows; norms stay whole on each.

A rank's part is a narrower model of the same class: its configuration has fewer heads, a smaller intermediate size and
vocabulary, the same hidden size. Which projections are cut along which side is transformers' own plan for the
architecture; the sums that make the parts a whole again are in `split_forward`.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from torchspec.backends.api import TargetError, TargetSpec
from torchspec.backends.hf.dequantised import unquantised
from torchspec.core.models.target_class import target_class
from torchspec.core.models.target_quantisation import unread
from torchspec.core.models.target_spec import load_target_config

_CUT = {"colwise": 0, "rowwise": 1}
_WHOLE = ("replicate", "replicated_with_grad_allreduce")
_EXPERTS = "moe_tp_experts"
_HEADS = ("num_attention_heads", "num_key_value_heads")
_NARROWED = (*_HEADS, "intermediate_size", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """`config` is the whole target's.

    sides    the dimension along which a projection's weight is cut, by a pattern of the projection's name below the
             base model, such as "layers.*.mlp.up_proj"
    experts  patterns of modules that hold routed experts; every rank has a part of each expert
    ends     names of the embedding and the head, whose rows are the vocabulary
    """

    spec: TargetSpec
    config: PreTrainedConfig
    sides: dict[str, int]
    experts: tuple[str, ...]
    ends: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of ranks, ascending from 1, that get equally many heads of either kind each."""
        heads = [getattr(self.config, field) for field in _HEADS]
        return tuple(size for size in range(1, min(heads) + 1) if all(count % size == 0 for count in heads))

    def check_size(self, size: int) -> None:
        """TargetError when this target cannot be split over `size` ranks."""
        if size not in self.sizes:
            spec = self.spec
            raise TargetError(
                f"{spec.path} ({spec.architecture}) has {spec.num_attention_heads} query and "
                f"{spec.num_key_value_heads} key/value heads, which {size} ranks cannot share evenly: "
                f"target.tensor_parallel may be {', '.join(map(str, self.sizes))}"
            )

    def narrow(self, rank: int, size: int) -> PreTrainedConfig:
        """The configuration of one rank's part."""
        config = copy.deepcopy(self.config)
        # Otherwise it would be derived from the narrower number of heads.
        config.head_dim = self.spec.head_dim
        # It may lie outside the rank's rows, and matters to training only.
        config.pad_token_id = None
        # Experts have sizes of their own.
        fields = config.to_dict().items()
        of_experts = [name for name, value in fields if name.endswith("_intermediate_size") and isinstance(value, int)]
        for field in (*_NARROWED, *of_experts):
            start, end = bounds(getattr(config, field), rank, size)
            setattr(config, field, end - start)
        return config

    def side(self, parameter: str) -> int | None:
        """The dimension along which this parameter of a checkpoint is cut; None when every rank has it whole."""
        module, _, kind = parameter.rpartition(".")
        if any(matches(end, module) for end in self.ends):
            return 0
        if any(matches(f"{pattern}.*", module.rpartition(".")[0]) for pattern in self.experts):
            return 1 if module.endswith(".down_proj") else 0
        side = next((side for pattern, side in self.sides.items() if matches(pattern, module)), None)
        return None if kind == "bias" and side == 1 else side

    def sums(self, module: str) -> bool:
        """Whether what this module of a rank's part puts out must be summed over the ranks."""
        rowwise = (pattern for pattern, side in self.sides.items() if side == 1)
        return any(matches(pattern, module) for pattern in (*self.experts, *rowwise))

    def misfits(self, whole: PreTrainedModel) -> list[str]:
        """Parameters of a rank's part that are not what this plan cuts out of the whole's; `whole` has no storage.

        Such are of modules that the plan does not know, or whose sizes follow from other fields of a configuration.
        """
        size = self.sizes[-1]
        part = skeleton(self.narrow(0, size), self.spec).state_dict()
        wrong = []
        for name, parameter in whole.state_dict().items():
            if any(matches(pattern, name.rpartition(".")[0]) for pattern in self.experts):
                continue
            shape, side = list(parameter.shape), self.side(name)
            if side is not None:
                shape[side] = bounds(shape[side], 0, size)[1]
            if name not in part or list(part[name].shape) != shape:
                wrong.append(name)
        return wrong


def skeleton(config: PreTrainedConfig, spec: TargetSpec) -> PreTrainedModel:
    """The model of a configuration without storage; TargetError when its class refuses to be so narrow."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = target_class(config).from_config(config, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # any architecture's constructor may fail in any way
        raise _refusal(spec, f"transformers cannot build a part of it: {error}") from error
    return model


def bounds(extent: int, rank: int, size: int) -> tuple[int, int]:
    """Start and end of the part of `extent` indices that this rank of `size` holds; parts differ by at most one."""
    return rank * extent // size, (rank + 1) * extent // size


def matches(pattern: str, module: str) -> bool:
    """Whether a module of this name, whatever stands before it, is meant; `*` stands for a number."""
    return re.fullmatch(r"(.*\.)?" + re.escape(pattern).replace(r"\*", r"\d+"), module) is not None


def split_plan(spec: TargetSpec) -> SplitPlan:
    """TargetError names what stands in the way of splitting this target, whatever the number of ranks."""
    whole = load_target_config(spec.path, trust_remote_code=spec.trust_remote_code)
    config = whole.get_text_config(decoder=True)
    if config is not whole:
        raise _refusal(spec, "it is a language model inside a multimodal one")
    if getattr(config, "is_heterogeneous", False):
        raise _refusal(spec, "its layers differ in their sizes")
    styles: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    experts = tuple(pattern for pattern, style in styles.items() if style == _EXPERTS)
    # How a rank's model lays out the parameters of its experts is its own affair.
    styles = {pattern: style for pattern, style in styles.items() if not pattern.startswith(experts)}
    foreign = sorted(set(styles.values()) - {*_CUT, *_WHOLE})
    odd = [field for field in _NARROWED if not isinstance(getattr(config, field, None), int)]
    if not set(_CUT) <= set(styles.values()):
        raise _refusal(spec, "transformers has no tensor-parallel plan for its layers")
    if foreign:
        raise _refusal(spec, f"its tensor-parallel plan in transformers asks for {', '.join(foreign)}")
    if odd:
        raise _refusal(spec, f"its configuration gives no single number as {', '.join(odd)}")
    if spec.quantisation is not None and (form := unread(spec.quantisation)):
        raise _refusal(spec, f"its weights are quantised in a form that torchspec does not read ({form})")
    config = unquantised(config)
    model = skeleton(config, spec)
    sides = {pattern: _CUT[style] for pattern, style in styles.items() if style in _CUT}
    plan = SplitPlan(spec=spec, config=config, sides=sides, experts=experts, ends=_ends(model))
    wrong = plan.misfits(model)
    if wrong:
        raise _refusal(spec, f"{len(wrong)} parameters are not divided by its plan, among them {', '.join(wrong[:3])}")
    return plan


def _ends(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the embedding and the head, without what a checkpoint may put before them."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    return tuple(name.rpartition(".")[2] for name, module in model.named_modules() if module in ends)


def _refusal(spec: TargetSpec, reason: str) -> TargetError:
    return TargetError(
        f"{spec.path}: the hf engine cannot split {spec.architecture} over several ranks: {reason}. "
        "Set target.tensor_parallel=1, or serve the target with another engine"
    )
