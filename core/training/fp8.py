"""FP8 in a training run: which products are made in it, by what, and what to say of it when the run starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from torchspec.core.config.schema import PrecisionConfig
from torchspec.core.interfaces.device import Device
from torchspec.core.models.layers import LinearMap
from torchspec.core.ops.fp8 import Scaling, fits
from torchspec.core.ops.maps import Fp8Maps, FrozenOperands

HEAD = "lm_head.weight"
"""Of a draft that has a head of its own."""


@dataclass(frozen=True, kw_only=True)
class Fp8Compute:
    """`frozen`: weights that are not trained are put into FP8 once a run."""

    scaling: Scaling
    frozen: FrozenOperands = field(default_factory=FrozenOperands)

    def device(self, device: Device) -> Device:
        """For one micro-batch, whose weights are put into FP8 once: sharding gathers them into the same memory every
        time and counts no version, so nothing made of them may be kept for the next."""
        return replace(device, ops=device.ops.with_maps(Fp8Maps(device.ops, self.scaling, self.frozen)))


def fp8_weights(draft: nn.Module) -> tuple[list[str], list[str]]:
    """(names of the weights that are multiplied by in FP8, names of the draft's other matrices but embeddings)."""
    modules = list(draft.named_modules())
    maps = {f"{name}.weight" for name, module in modules if isinstance(module, LinearMap)}
    tables = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding)}
    matrices = {name: p for name, p in draft.named_parameters() if p.dim() == 2 and name not in tables}
    inside = [name for name, p in matrices.items() if name in maps and fits(p)]
    return inside, [name for name in matrices if name not in inside]


def scaling_of(precision: PrecisionConfig) -> Scaling:
    """What `precision.fp8_scaling` comes to."""
    return precision.fp8_scaling or "row"


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """Weights of a sharded draft are gathered in FP8. `head_in_parts`: ranks multiply by their parts of the head."""

    scaling: Scaling
    head_in_parts: bool

    def weights(self, draft: nn.Module) -> list[str]:
        """Names of those that are read in FP8 alone: of a head in parts, a part may have any number of rows."""
        inside, _ = fp8_weights(draft)
        called = {f"{name}.weight" for name, module in draft.named_modules() if getattr(module, "called", False)}
        return [name for name in inside if name not in called and not (self.head_in_parts and name == HEAD)]


def gathering_of(precision: PrecisionConfig, ranks: int, *, head_in_parts: bool = False) -> Gathering | None:
    """How `ranks` gather the weights of a draft that they share; None: all in their compute precision."""
    wanted = {"on": True, "off": False, "auto": ranks > 1}[precision.fp8_all_gather]
    if precision.compute != "fp8" or not wanted:
        return None
    return Gathering(scaling=scaling_of(precision), head_in_parts=head_in_parts)


def described(draft: nn.Module, scaling: Scaling, gathering: Gathering | None) -> str:
    """Which weights are multiplied by in FP8, and which are not; how many ranks gather in it. A target's head, which is
    no weight of a draft, is not among them."""
    inside, outside = fp8_weights(draft)
    text = f"fp8: {len(inside)} weights of the draft are multiplied by in FP8, with a scale for each {scaling}"
    if gathering is not None:
        text += f", and {len(gathering.weights(draft))} of them gathered in it"
    return f"{text}; in bfloat16 stay {', '.join(outside)}" if outside else text


def emulation(device: Device) -> str | None:
    """That the device only emulates it, and why."""
    support = device.ops.fp8
    if support.kind != "emulated":
        return None
    return f"fp8 is emulated on {device.name}: numbers as on hardware, no speed ({support.reason})"
