"""A target loaded through transformers, and what the engine needs to know of its inside."""

from __future__ import annotations

import logging as log
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from torchspec.backends.api import ConfigError, EngineOptions, Problem, TargetError, TargetSpec
from torchspec.backends.hf.attention import use_grouped_attention
from torchspec.backends.hf.cache import Rollback, rollback_of
from torchspec.backends.hf.dequantised import examine, load_dequantised
from torchspec.backends.hf.split_weights import load_part
from torchspec.core.models.target_class import target_class
from torchspec.core.models.target_head import decoder_of
from torchspec.core.models.target_processor import TargetProcessor
from torchspec.core.models.target_quantisation import described
from torchspec.core.models.target_spec import load_target_config, read_target_spec
from torchspec.core.models.target_weights import TargetWeights

logger = log.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, eq=False)
class HfTarget:
    """`base` runs everything below the output head; `layers` are its decoder layers in order.

    Of a target that several ranks hold together, `model` is this rank's part, `spec` the whole's.
    """

    spec: TargetSpec
    model: PreTrainedModel
    base: nn.Module
    layers: tuple[nn.Module, ...]
    device: torch.device
    rollback: Rollback

    @cached_property
    def processor(self) -> TargetProcessor:
        """Loaded when the first image comes; TargetError when this target takes none."""
        return TargetProcessor.load(self.spec.path, trust_remote_code=self.spec.trust_remote_code)

    def check_taps(self, taps: Sequence[int]) -> None:
        """ConfigError naming the valid range when a tap is not a layer of this target."""
        wrong = [tap for tap in taps if not 0 <= tap < len(self.layers)]
        if wrong:
            raise ConfigError(
                [
                    Problem(
                        field="taps",
                        value=list(taps),
                        message=f"{wrong} are not layers of {self.spec.path}, which has {len(self.layers)}",
                        remedy=f"name layers from 0 to {len(self.layers) - 1}",
                    )
                ]
            )

    def check_tokens(self, name: str, input_ids: Sequence[int]) -> None:
        """ValueError when there are no tokens, or some that the target has no embedding for."""
        if not len(input_ids):
            raise ValueError(f"{name} has no tokens")
        lowest, highest = (int(bound) for bound in torch.as_tensor(input_ids).aminmax())
        if lowest < 0 or highest >= self.spec.vocab_size:
            raise ValueError(
                f"{name} has token ids from {lowest} to {highest}, but {self.spec.path} knows 0 to "
                f"{self.spec.vocab_size - 1}: it was tokenised for another target"
            )


def choose_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype a target runs in: as named; `auto` is as stored, but float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if name not in DTYPES:
        raise ConfigError(
            [
                Problem(
                    field="target.dtype", value=name, message="no such precision of a target", choices=("auto", *DTYPES)
                )
            ]
        )
    return DTYPES[name]


def load_target(options: EngineOptions) -> HfTarget:
    """The target or this rank's part of it, in evaluation mode on the device of `options.local_rank`; local files only.

    Raises TargetError when the directory does not hold a whole model of a supported kind: parameters that the
    checkpoint lacks are an error, never initialised at random.
    """
    spec = read_target_spec(options.target, options.trust_remote_code)
    weights = TargetWeights.open(options.target)
    how = examine(spec)
    if spec.quantisation is not None and options.local_rank == 0:
        logger.info("%s is quantised (%s): %s", options.target, described(spec.quantisation), how)
    device = options.device.runtime.bind(options.local_rank)
    dtype = choose_dtype(options.dtype, spec.dtype, device)
    model, report = _load(options, spec, weights, dtype)
    missing = [*sorted(report["missing_keys"]), *(_mismatch(*key) for key in sorted(report["mismatched_keys"]))]
    if missing:
        split = options.tensor_mesh is not None and options.tensor_mesh.size() > 1
        raise TargetError(
            f"{options.target}: {len(missing)} parameters of {type(model).__name__} are missing from the checkpoint "
            f"or have another shape: {', '.join(missing[:8])}. Is config.json that of these weights?"
            + (" If target.tensor_parallel=1 loads them, this architecture cannot be split." if split else "")
        )
    model = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    use_grouped_attention(model, device)
    return HfTarget(
        spec=spec,
        model=model,
        base=_base(model),
        layers=_decoder_layers(model, spec.num_layers),
        device=device,
        rollback=rollback_of(model),
    )


def _mismatch(name: str, stored: torch.Size, expected: torch.Size) -> str:
    return f"{name} (stored {list(stored)}, expected {list(expected)})"


def _load(
    options: EngineOptions, spec: TargetSpec, weights: TargetWeights, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model on the CPU, and what transformers found missing or misshapen, which the caller reports."""
    mesh = options.tensor_mesh
    with _quiet_transformers():
        try:
            loaded: Any
            if mesh is not None and mesh.size() > 1:
                loaded = load_part(spec, weights, mesh, dtype)
            elif weights.quantised:
                loaded = load_dequantised(spec, weights, dtype)
            else:
                loaded = _from_pretrained(options, dtype)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise TargetError(f"transformers cannot load {options.target}: {error}") from error
    model, report = loaded
    return model, report


def _from_pretrained(options: EngineOptions, dtype: torch.dtype) -> Any:
    config = load_target_config(options.target, trust_remote_code=options.trust_remote_code)
    return target_class(config).from_pretrained(
        options.target,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=options.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports of transformers' own: the caller shows progress and raises errors."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _base(model: PreTrainedModel) -> nn.Module:
    base = model.base_model if model.base_model is not model else decoder_of(model)
    if base is model:
        raise TargetError(f"{type(model).__name__} has no base model below its output head")
    assert isinstance(base, nn.Module)
    return base


def _decoder_layers(model: PreTrainedModel, num_layers: int) -> tuple[nn.Module, ...]:
    decoder = decoder_of(model)
    stacks = [
        module for module in decoder.children() if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if len(stacks) != 1:
        raise TargetError(
            f"{type(decoder).__name__} has {len(stacks)} lists of {num_layers} modules where its decoder layers "
            "should be exactly one: the hf engine cannot tap it"
        )
    return tuple(stacks[0])
