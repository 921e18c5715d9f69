"""Multi-token-prediction heads under their target's own names, and back.

No engine serves such a directory by itself: a head is part of its target's checkpoint, so the tensors are to take the
place of those there. Where the target is one file, all its tensors are written again with these in it; where it is
sharded, model.safetensors goes beside the shards under another name, and model.safetensors.index.json sends each of
its names there. config.json repeats what the target's says of the layer, and `num_nextn_predict_layers`. Heads in the
speculators layout are read too (`mtp.speculators`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchspec.core.algorithms.mtp.families import FAMILIES
from torchspec.core.algorithms.mtp.geometry import Geometry, geometry_of
from torchspec.core.algorithms.mtp.model import MtpDraft
from torchspec.core.algorithms.mtp.options import MtpOptions
from torchspec.core.algorithms.mtp.serving import check_names
from torchspec.core.algorithms.mtp.speculators import as_plain
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.export.draft_config import copy_field, layer_fields, llama_fields, object_at
from torchspec.core.export.draft_tensors import load_stored
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.engine import TargetSpec

if TYPE_CHECKING:
    from torchspec.core.algorithms.mtp.algorithm import Mtp

LAYOUTS = ("plain",)


def to_files(algorithm: Mtp, state: Mapping[str, Tensor], layout: str) -> DraftFiles:
    """The head in its target's names. Raises ConfigError for a layout that no engine reads a head from."""
    if layout not in LAYOUTS:
        problem = Problem(
            field="layout",
            value=layout,
            message="engines read a multi-token-prediction head from its target's own directory",
            choices=LAYOUTS,
            remedy="export with --format hf, and put the tensors into a copy of the target",
        )
        raise ConfigError([problem])
    geometry, target = algorithm.geometry, algorithm.target
    tensors = {geometry.rules.stored(name, target.num_layers): tensor for name, tensor in state.items()}
    dtype = str(state["norm.weight"].dtype).removeprefix("torch.")
    return DraftFiles(config=_config(geometry, target, dtype), tensors=tensors, notes=_notes(algorithm))


def _config(geometry: Geometry, target: TargetSpec, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [target.architecture],
        **llama_fields(geometry, geometry.vocab_size, dtype, num_layers=target.num_layers),
        "model_type": target.model_type,
        "attention_bias": geometry.qkv_bias,
        "tie_word_embeddings": target.tie_word_embeddings,
        "num_nextn_predict_layers": 1,
        "torchspec": {"algorithm": "mtp", "family": geometry.family, "target_layers": target.num_layers},
    }


def _notes(algorithm: Mtp) -> tuple[str, ...]:
    steps = algorithm.options.unroll
    merge = (
        f"a head is served from its target's directory: put these tensors in place of those in a copy of "
        f"{algorithm.target.path} (beside shards: under another file name, with model.safetensors.index.json naming "
        f'it), then `vllm serve COPY --speculative-config \'{{"method": "mtp", "num_speculative_tokens": {steps}}}\'`'
    )
    if algorithm.geometry.family != "mimo":
        return (merge,)
    return (
        merge,
        "vLLM hands MiMo's head the hidden state before the target's final norm, as it was trained on here; SGLang "
        "hands it the state after that norm, and would accept fewer drafted tokens",
    )


def from_files(files: DraftFiles, target: TargetSpec) -> tuple[Mtp, nn.Module]:
    """Rebuild the algorithm and its float32 draft; see `AlgorithmSpec.from_files`. The target need not hold a head."""
    from torchspec.core.algorithms.mtp.algorithm import Mtp

    try:
        files = as_plain(files, target)
        fields = layer_fields(files.config)
        ours: dict[str, Any] = {}
        copy_field(ours, "family", object_at(files.config, "torchspec"), str)
        copy_field(ours, "target_layers", object_at(files.config, "torchspec"), int)
    except ValueError as error:
        raise CheckpointError(f"config.json of the draft: {error}") from error
    if ours.get("family") not in FAMILIES:
        raise CheckpointError(
            f"config.json of the draft: torchspec.family is {ours.get('family')!r}; known: {', '.join(FAMILIES)}"
        )
    check_names(files)
    family = FAMILIES[ours["family"]]
    geometry = geometry_of(target, family, files.tensors)
    _check_target(fields | {"target_layers": ours.get("target_layers")}, geometry, target)
    draft = MtpDraft(geometry)
    named = {family.stored(name, target.num_layers): name for name in draft.state_dict()}
    load_stored(draft, {named.get(name, name): tensor for name, tensor in files.tensors.items()})
    return Mtp.of(MtpOptions(init="random", family=family.name), target, geometry), draft


def _check_target(stated: Mapping[str, Any], geometry: Geometry, target: TargetSpec) -> None:
    theirs = {**vars(geometry), "target_layers": target.num_layers}
    wrong = [f"{name} {value}, not {theirs[name]}" for name, value in stated.items() if theirs[name] != value]
    if wrong:
        raise CheckpointError(f"this head was made for a target with {'; '.join(wrong)}: {target.path} is another")
