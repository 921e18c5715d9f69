"""Whether the chosen device and engine can do what the configuration asks of them."""

from __future__ import annotations

from dataclasses import dataclass

from torchspec.core import registry
from torchspec.core.config.schema import PrecisionConfig, RunConfig
from torchspec.core.errors import Problem
from torchspec.core.interfaces.device import DeviceSpec
from torchspec.core.interfaces.engine import EngineSpec, TargetSpec
from torchspec.core.pipeline.served_checks import given, serving_engine, serving_problems


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How many there are, in all and on this machine; `launched`: by a launcher, which decides what each sees."""

    all: int = 1
    here: int = 1
    launched: bool = False


def device_problems(config: RunConfig, device: DeviceSpec, ranks: Ranks) -> list[Problem]:
    """Nothing is said of a device that is not there: its probe says why."""
    found: list[Problem] = []
    if not registry.probe(device).ok:
        return found
    if config.precision.compute == "bfloat16" and "bf16" not in device.capabilities:
        found.append(
            Problem(
                field="precision.compute",
                value=config.precision.compute,
                message=f"device {device.name} does not compute in bfloat16",
                choices=("float32",),
            )
        )
    if config.precision.compute == "fp8" and not {"fp8", "bf16"} <= device.capabilities:
        found.append(
            Problem(
                field="precision.compute",
                value=config.precision.compute,
                message=f"device {device.name} neither multiplies FP8 matrices nor offers to emulate it",
                choices=("float32", *(["bfloat16"] if "bf16" in device.capabilities else [])),
            )
        )
    if config.train.optimizer == "adamw8bit" and "compile" not in device.capabilities:
        found.append(
            Problem(
                field="train.optimizer",
                value=config.train.optimizer,
                message=f"needs torch.compile, which device {device.name} does not have",
                choices=("adamw",),
            )
        )
    if config.train.offload != "none" and device.device_type == "cpu":
        found.append(
            Problem(
                field="train.offload",
                value=config.train.offload,
                message=f"the memory of device {device.name} is the host's already",
                choices=("none",),
            )
        )
    if ranks.here > 1 and "ranks_share_device" not in device.capabilities:
        count = device.load().runtime.device_count()
        its_own = ranks.launched and count == 1  # some launchers show each rank one device, another for each
        if ranks.here > count and not its_own:
            found.append(
                Problem(
                    field="nproc",
                    value=ranks.here,
                    message=f"only {count} {device.name} device(s) are visible here",
                    remedy=f"start at most {count} ranks",
                )
            )
    return found


def precision_problems(precision: PrecisionConfig, *, several: bool) -> list[Problem]:
    """What is said of a precision that is not computed in, or of a gathering where no `several` ranks share a draft."""
    if precision.compute == "fp8":
        if precision.fp8_all_gather != "on" or several:
            return []
        message, remedy = "one rank gathers nothing", "start several, or leave it at auto"
        return [Problem(field="precision.fp8_all_gather", value="on", message=message, remedy=remedy)]
    given = {"fp8_scaling": precision.fp8_scaling, "fp8_all_gather": precision.fp8_all_gather}
    message = f"is for precision.compute=fp8, not {precision.compute}"
    remedy = "leave it out, or compute in fp8"
    return [
        Problem(field=f"precision.{name}", value=value, message=message, remedy=remedy)
        for name, value in given.items()
        if value not in (None, "auto")
    ]


def examined(backend: EngineSpec, target: TargetSpec) -> str | None:
    """What is worth knowing of how the engine runs a quantised target; TargetError when it cannot run this target."""
    if backend.examine is not None:
        return backend.examine(target)
    return None if target.quantisation is None else f"backend {backend.name} runs it with kernels of its own"


ATTACHED = frozenset({"url", "start_timeout", "call_timeout"})
"""What still means something of an engine that was started elsewhere."""


def backend_problems(config: RunConfig, backend: EngineSpec) -> list[Problem]:
    """Validation decodes, which not every engine can; and settings of an engine's process need one that has it."""
    found = []
    if backend.available is None and config.pipeline.topology == "inprocess":
        found = [
            Problem(
                field=f"engine.{name}",
                message=f"backend {config.backend} runs inside the trainer and has no such setting",
                remedy="leave it out, or use a backend that runs in a process of its own, or another pipeline.topology",
            )
            for name in given(config.engine)
        ]
    if config.engine.url is not None and config.pipeline.topology != "offline":
        found += [
            Problem(
                field=f"engine.{name}",
                message="is said where the worker is started, not where one attaches to it",
                remedy="give it to the worker's own command, or leave engine.url out",
            )
            for name in given(config.engine)
            if name not in ATTACHED
        ]
    found += serving_problems(config, backend)
    if not config.data.validation or serving_engine(config, backend) or "decode" in backend.capabilities:
        return found
    return [
        *found,
        Problem(
            field="data.validation",
            message=f"backend {config.backend} cannot decode with a draft, which validation needs",
            remedy="leave data.validation out, or use a backend with the capability `decode`, such as hf",
        ),
    ]
