"""EAGLE-3 and EAGLE-3.1 drafts in the field's two published layouts, and back.

plain        `architectures: [LlamaForCausalLMEagle3]`, layer named `midlayer`: SGLang, and vLLM with default taps
speculators  `speculators_model_type: eagle3`, layer named `layers.0`: vLLM, which then needs no other argument

A draft with latent attention (`latent`) has a plain layout of its own architecture, and no speculators layout: whatever
that says of its layer, vLLM reads a Llama's.

Numbering of tapped layers, where ours is l: the speculators layout stores l + 1 (vLLM reads Hugging Face indices);
the plain layout's explicit list is read by SGLang as l and by vLLM as l + 1, so it is written only where it must be,
for taps that are not both engines' default, in SGLang's numbering.

EAGLE-3.1 adds the fields `fc_norm`, `norm_before_fc` and `norm_output` to the config and the tensors
`fc_norm.0.weight`, ... of the taps in order, or `input_norm.weight` of all together. Either engine reads them in its
layouts: vLLM since 0.22 in the plain one (its change 42764) and since its change 46488 in the speculators one, SGLang
since its change 24663 (norm_before_fc is seen in SGLang 0.5.23 and vLLM 0.32.0); earlier versions skip them without a
word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchspec.core.algorithms.eagle3 import LATENT_ARCHITECTURES
from torchspec.core.algorithms.eagle3.derive import derive, geometry_fields
from torchspec.core.algorithms.eagle3.geometry import NORMS, Geometry, default_taps
from torchspec.core.algorithms.eagle3.latent import LatentGeometry, latent_layer, latent_notes
from torchspec.core.algorithms.eagle3.model import Eagle3Draft
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.algorithms.eagle3.serving import VOCABULARY_TENSORS, check_names, layer_prefix
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.export.draft_config import layers_listed, llama_fields, object_at, speculators_fields
from torchspec.core.export.draft_tensors import check_embedding, load_stored, read_vocabulary
from torchspec.core.export.speculators import is_speculators
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.engine import TargetSpec

if TYPE_CHECKING:
    from torchspec.core.algorithms.eagle3.algorithm import Eagle3

LAYOUTS = ("plain", "speculators")
ENGINE_TAPS = 3
OURS = "midlayer."


def to_files(algorithm: Eagle3, state: Mapping[str, Tensor], layout: str) -> DraftFiles:
    """The draft in a published layout. Raises ConfigError where the layout's readers could not serve it."""
    if layout not in LAYOUTS:
        raise ConfigError([Problem(field="layout", value=layout, message="unknown layout", choices=LAYOUTS)])
    geometry, taps, target = algorithm.geometry, algorithm.taps, algorithm.target
    dtype = str(state["fc.weight"].dtype).removeprefix("torch.")
    layer = llama_fields(geometry, geometry.vocab_size, dtype)
    if isinstance(geometry, LatentGeometry):
        layer = latent_layer(geometry, layer)
    if geometry.draft_vocab_size == geometry.vocab_size:
        # Of a vocabulary that was not pruned vLLM has no map, and refuses a checkpoint that holds one.
        state = {name: tensor for name, tensor in state.items() if name not in VOCABULARY_TENSORS}
    if layout == "plain":
        problems = _plain_problems(geometry, taps)
        if problems:
            raise ConfigError(problems)
        config = _plain(geometry, taps, target, layer)
        notes = _plain_notes(geometry, taps, target) + _norm_notes(geometry) + latent_notes(geometry)
        return DraftFiles(config=config, tensors=dict(state), notes=notes)
    problems = _speculators_problems(geometry)
    if problems:
        raise ConfigError(problems)
    config = _speculators(geometry, taps, target, layer, tokens=min(5, algorithm.options.unroll))
    prefix = layer_prefix(config)
    tensors = {name.replace(OURS, prefix): value for name, value in state.items()}
    return DraftFiles(config=config, tensors=tensors, notes=_norm_notes(geometry))


def layouts(geometry: Geometry, taps: tuple[int, ...]) -> tuple[str, ...]:
    """Those that can hold such a draft; plain first, since both engines read it."""
    problems = {"plain": _plain_problems(geometry, taps), "speculators": _speculators_problems(geometry)}
    return tuple(layout for layout in LAYOUTS if not problems[layout])


def _speculators_problems(geometry: Geometry) -> list[Problem]:
    if not isinstance(geometry, LatentGeometry):
        return []
    return [
        Problem(
            field="draft.attention",
            value=geometry.attention,
            message="vLLM takes the layer of every speculators draft for a Llama's",
            remedy="export with --format sglang: vLLM reads that layout, too",
        )
    ]


def _plain_problems(geometry: Geometry, taps: tuple[int, ...]) -> list[Problem]:
    problems = []
    # With latent attention one tap alone is refused when a run begins.
    if len(taps) == 1 and not isinstance(geometry, LatentGeometry):
        problems.append(
            Problem(
                field="draft.taps",
                value=list(taps),
                message="SGLang hands a single tap to the layer as it is, past fc",
                remedy="train with two taps or more, or export with --format vllm",
            )
        )
    if geometry.norm_before_residual:
        problems.append(
            Problem(
                field="draft.norm_before_residual",
                value=True,
                message="SGLang does not read this flag and would serve the draft without it",
                remedy="train without it, or export with --format vllm",
            )
        )
    return problems


def _plain_notes(geometry: Geometry, taps: tuple[int, ...], target: TargetSpec) -> tuple[str, ...]:
    if taps == default_taps(target.num_layers):
        return ()
    older: tuple[str, ...] = ()
    if len(taps) != ENGINE_TAPS and not isinstance(geometry, LatentGeometry):
        older = (
            f"SGLang loads plain EAGLE-3 drafts of {ENGINE_TAPS} taps, and those of others since its change 24663 (May "
            f"2026); this one has {len(taps)}",
        )
    remedy = (
        "train it on the default taps" if isinstance(geometry, LatentGeometry) else "torchspec export --format vllm"
    )
    return (
        f"only SGLang taps the layers {list(taps)} for it: vLLM reads the plain layout's explicit list as one layer "
        f"lower each, and the draft would be accepted rarely. For vLLM: {remedy}",
        *older,
    )


def _norm_notes(geometry: Geometry) -> tuple[str, ...]:
    used = [name for name in NORMS if getattr(geometry, name)]
    if not used:
        return ()
    return (
        f"an engine older than EAGLE-3.1 (May 2026) serves it without {' and '.join(used)}, and the draft would be "
        "accepted rarely",
    )


def _plain(geometry: Geometry, taps: tuple[int, ...], target: TargetSpec, layer: Mapping[str, Any]) -> dict[str, Any]:
    latent = isinstance(geometry, LatentGeometry)
    config = {
        "architectures": [LATENT_ARCHITECTURES[0] if latent else "LlamaForCausalLMEagle3"],
        **layer,
        "draft_vocab_size": geometry.draft_vocab_size,
        "target_hidden_size": geometry.target_hidden_size,
        "norm_before_residual": geometry.norm_before_residual,
        "fc_norm": geometry.fc_norm,
        "norm_before_fc": geometry.norm_before_fc,
        "norm_output": geometry.norm_output,
        "eagle_config": {"use_aux_hidden_state": True},
        "torchspec": {"tap_layers": list(taps)},
    }
    if taps != default_taps(target.num_layers):
        config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = list(taps)
    if len(taps) != ENGINE_TAPS:
        config["num_aux_hidden_states"] = len(taps)  # both engines' name for it, which SGLang may also count itself
    return config


def _speculators(
    geometry: Geometry, taps: tuple[int, ...], target: TargetSpec, layer: Mapping[str, Any], tokens: int
) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3Speculator"],
        **speculators_fields("eagle3", target, layer, tokens=tokens),
        "draft_vocab_size": geometry.draft_vocab_size,
        "target_hidden_size": geometry.target_hidden_size,
        "norm_before_residual": geometry.norm_before_residual,
        "norm_before_fc": geometry.norm_before_fc,
        "fc_norm": geometry.fc_norm,
        "norm_output": geometry.norm_output,
        "eagle_aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in taps],
        "torchspec": {"tap_layers": list(taps)},
    }


def from_files(
    files: DraftFiles, target: TargetSpec, algorithm: type[Eagle3], options_type: type[Eagle3Options]
) -> tuple[Eagle3, nn.Module]:
    """Rebuild the algorithm and its float32 draft; see `AlgorithmSpec.from_files`.

    A checkpoint of another tool that lists plain-layout taps is read in SGLang's numbering.
    """
    try:
        fields = geometry_fields(files.config)
        taps = _taps(files.config, fields)
    except ValueError as error:
        raise CheckpointError(f"config.json of the draft: {error}") from error
    norms = {name: bool(files.config.get(name)) for name in NORMS if name in options_type.model_fields}
    options = options_type(taps=taps, norm_before_residual=_norm_before_residual(files.config), **norms)
    try:
        geometry, taps_used = derive(options, target, fields)
    except ConfigError as error:
        listed = "\n".join(f"  - {problem}" for problem in error.problems)
        raise CheckpointError(f"this draft does not fit the target {target.path}:\n{listed}") from error
    check_names(files, len(taps_used))
    _check_taps(files.tensors["fc.weight"], geometry)
    vocabulary = read_vocabulary(files.tensors, geometry.draft_vocab_size, geometry.vocab_size)
    draft = Eagle3Draft(geometry, vocabulary)
    state = {name.replace(layer_prefix(files.config), OURS): value for name, value in files.tensors.items()}
    state |= {"d2t": vocabulary.d2t_N, "t2d": vocabulary.t2d_V}
    if not geometry.owns_embedding and "embed_tokens.weight" in state:
        check_embedding(state.pop("embed_tokens.weight"), target)
    load_stored(draft, state)
    options = options.model_copy(update={"taps": taps_used, "vocab_size": vocabulary.size})
    return algorithm(options=options, target=target, geometry=geometry, taps=taps_used), draft


def _check_taps(weight_HF: Tensor, geometry: Geometry) -> None:
    """CheckpointError for a map of more or fewer taps than config.json says."""
    size = geometry.target_hidden_size
    if weight_HF.shape[-1] == geometry.num_taps * size:
        return
    held = weight_HF.shape[-1] / size
    raise CheckpointError(
        f"fc reads {held:g} taps of {size} values and config.json says {geometry.num_taps}: name the layers in "
        "eagle_config.eagle_aux_hidden_state_layer_ids (0-based outputs), and target_hidden_size where it is another"
    )


def _taps(config: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    ours = layers_listed(object_at(config, "torchspec"), "tap_layers")
    if ours is not None:
        return ours
    if "taps" in fields:
        return tuple(fields["taps"])
    return layers_listed(object_at(config, "eagle_config"), "eagle_aux_hidden_state_layer_ids")


def _norm_before_residual(config: Mapping[str, Any]) -> bool:
    """Where the flag is missing, vLLM takes True for the speculators layout and False for the plain one."""
    return bool(config.get("norm_before_residual", is_speculators(config)))
