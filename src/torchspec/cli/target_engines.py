"""How a target is stored and which engines can run it here, as `torchspec doctor --target` says: headers and
configuration are read, no weight is and no engine is started."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torchspec.core.errors import TorchspecError

if TYPE_CHECKING:
    from torchspec.cli.schemas import EngineFlags
    from torchspec.core.interfaces.engine import TargetSpec


def examine_target(options: EngineFlags) -> dict[str, Any]:
    """Architecture, form, bytes as stored and as floats, and per engine: name, available, reason, remedy.

    Raises TargetError where there is no target to look at.
    """
    import torch

    from torchspec.core import registry, settings
    from torchspec.core.models.target_quantisation import described, unread
    from torchspec.core.models.target_spec import read_target_spec, resolve_target, running_dtype
    from torchspec.core.models.target_weights import TargetWeights

    path = resolve_target(options.target)
    spec = read_target_spec(path, options.trust_remote_code)
    weights = TargetWeights.open(path)
    device = registry.choose_device(options.device, settings.default_device())[0]
    dtype = running_dtype(options.dtype, spec.dtype, torch.device(registry.devices().spec(device).device_type))
    form = spec.quantisation
    return {
        "path": str(path),
        "architecture": spec.architecture,
        "device": device,
        "quantised": None if form is None else described(form),
        "not_read": None if form is None else unread(form),
        "stored_bytes": sum(tensor.nbytes for tensor in weights.stored.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "float_bytes": dtype.itemsize * sum(math.prod(weights.shape(name)) for name in weights.files),
        "engines": [_engine(name, spec, device, options) for name in registry.backends().names()],
    }


def _engine(name: str, target: TargetSpec, device: str, options: EngineFlags) -> dict[str, Any]:
    from torchspec.core import registry
    from torchspec.core.pipeline.device_fit import examined

    facts: dict[str, Any] = {"name": name, "available": False, "reason": "", "remedy": ""}
    try:
        spec = registry.backends().spec(name)
        process = options.engine_config().process()
        answer = registry.probe(spec) if spec.available is None else spec.available(device, process)
        if not answer.ok:
            return {**facts, "reason": answer.reason, "remedy": answer.hint}
        return {**facts, "available": True, "reason": examined(spec, target) or "runs it as it is stored"}
    except TorchspecError as error:
        return {**facts, "reason": str(error)}


def lines(found: dict[str, Any]) -> list[str]:
    """For people, but for the engines."""
    form, stored, floats = found["quantised"], found["stored_bytes"] / 1e9, found["float_bytes"] / 1e9
    said = [f"target {found['path']}: {found['architecture']}, {stored:.3g} GB of weights"]
    if form is None:
        return [*said, "not quantised"]
    said.append(f"quantised: {form}")
    if found["not_read"] is None:
        said.append(f"the hf engine would dequantise it: {floats:.3g} GB in {found['dtype']} on {found['device']}")
    else:
        said.append(f"torchspec does not read this form ({found['not_read']}): the hf engine cannot dequantise it")
    return said
