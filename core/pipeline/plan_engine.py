"""Whether an engine with devices or processes of its own can hold the target, from its configuration alone.

What an engine holds beside weights and a cache (activations, compiled graphs, its own buffers) it decides for itself,
so the plan says what is left for that and judges the rest.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torchspec.core.config.schema import RunConfig
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_outline import stored_bytes
from torchspec.core.models.target_weights import TargetWeights
from torchspec.core.pipeline.plan_fit import aligned, size
from torchspec.core.pipeline.plan_load import Subject
from torchspec.core.pipeline.topology_fit import engine_fraction

OWN_FRACTION = 0.9
"""Of a device's memory, what engines take where they are not told: vLLM and SGLang come close to it."""
MOST_DEVICES = 64
CACHE_BYTES = 2
"""Of a cached value: bfloat16 or float16."""


@dataclass(frozen=True, kw_only=True)
class EngineFit:
    """Bytes of one of the `devices` over which an engine splits the target.

    cache    keys and values of one sample of `data.max_length`, all layers taken to keep all of them
    share    what the engine may take; None: the device does not say how much it has
    enough   the fewest devices that hold it; None: it fits, or no number helps
    """

    devices: int
    weights: int
    cache: int
    share: int | None
    enough: int | None = None

    @property
    def fits(self) -> bool:
        return self.share is None or self.weights + self.cache <= self.share

    def verdict(self) -> str:
        held = self.weights + self.cache
        if self.share is None:
            return "the device does not say how much memory it has: device_gb=N plans for one of N GB"
        if self.fits:
            return (
                f"fits: {size(held)} of {size(self.share)}, {size(self.share - held)} are left for what it works with"
            )
        remedy = "no number of devices is enough"
        if self.enough is not None:
            remedy = f"engine.tensor_parallel={self.enough} would do"
        return f"does not fit: {size(held)} of {size(self.share)}; {remedy}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits, "verdict": self.verdict()}

    def lines(self) -> list[str]:
        over = f" over {self.devices} device(s)"
        rows = [
            ("target model", f"{size(self.weights):>8}", f"its weights{over}"),
            ("keys and values", f"{size(self.cache):>8}", "of one sample of data.max_length"),
        ]
        return ["memory per device of an engine (estimate)", *aligned(rows), f"  {self.verdict()}"]


def engine_fit(config: RunConfig, subject: Subject, weights: TargetWeights) -> EngineFit | None:
    """None where no engine has memory of its own to look at: it is in the trainer, or offline, or on a CPU."""
    if subject.models.target or config.pipeline.topology == "offline" or subject.on_host:
        return None
    target, itemsize = subject.models.spec, subject.dtype.itemsize
    as_stored = target.quantisation is not None and subject.backend.start is not None
    total = (
        stored_bytes(weights, itemsize)
        if as_stored
        else itemsize * sum(math.prod(weights.shape(name)) for name in weights.files)
    )
    share = None
    if subject.total:
        share = int(subject.total * (engine_fraction(config, subject.device.device_type) or OWN_FRACTION))

    def over(devices: int) -> EngineFit:
        cache = config.data.max_length * cache_row(target, devices)
        return EngineFit(devices=devices, weights=total // devices, cache=cache, share=share)

    fit = over(config.engine.tensor_parallel)
    if fit.fits:
        return fit
    sizes = (2**power for power in range(MOST_DEVICES.bit_length()) if target.num_attention_heads % 2**power == 0)
    return EngineFit(
        devices=fit.devices,
        weights=fit.weights,
        cache=fit.cache,
        share=share,
        enough=next((devices for devices in sizes if over(devices).fits), None),
    )


def cache_row(target: TargetSpec, devices: int = 1) -> int:
    """Bytes that the cache of a token takes on each of so many devices. Heads are divided as far as they go; latents
    (2405.04434) are one for all heads, so each device has them whole."""
    if target.latent_sizes is not None:
        values = target.latent_sizes["kv_lora_rank"] + target.latent_sizes.get("qk_rope_head_dim", 0)
    else:
        values = 2 * -(-target.num_key_value_heads // devices) * target.head_dim
    return CACHE_BYTES * target.num_layers * values
