"""EAGLE-3 drafts in the field's two published layouts, and back.

plain        `architectures: [LlamaForCausalLMEagle3]`, layer named `midlayer`: SGLang, and vLLM with default taps
speculators  `speculators_model_type: eagle3`, layer named `layers.0`: vLLM, which then needs no other argument

Numbering of tapped layers, where ours is l: the speculators layout stores l + 1 (vLLM reads Hugging Face indices);
the plain layout's explicit list is read by SGLang as l and by vLLM as l + 1, so it is written only where it must be,
for taps that are not both engines' default, in SGLang's numbering.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchspec.core.algorithms.eagle3.geometry import (
    Geometry,
    default_taps,
    derive,
    geometry_fields,
    layers_listed,
    object_at,
)
from torchspec.core.algorithms.eagle3.model import Eagle3Draft
from torchspec.core.algorithms.eagle3.options import Eagle3Options
from torchspec.core.algorithms.eagle3.serving import VOCABULARY_TENSORS, check_names, layer_prefix
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.models.target_head import load_target_head

if TYPE_CHECKING:
    from torchspec.core.algorithms.eagle3.algorithm import Eagle3

LAYOUTS = ("plain", "speculators")
SPECULATORS_VERSION = "0.3.0"
ENGINE_TAPS = 3
OURS = "midlayer."


def to_files(algorithm: Eagle3, state: Mapping[str, Tensor], layout: str) -> DraftFiles:
    """The draft in a published layout. Raises ConfigError where the layout's readers could not serve it."""
    if layout not in LAYOUTS:
        raise ConfigError([Problem(field="layout", value=layout, message="unknown layout", choices=LAYOUTS)])
    geometry, taps, target = algorithm.geometry, algorithm.taps, algorithm.target
    dtype = str(state["fc.weight"].dtype).removeprefix("torch.")
    layer = _layer_config(geometry, dtype)
    if geometry.draft_vocab_size == geometry.vocab_size:
        # Of a vocabulary that was not pruned vLLM has no map, and refuses a checkpoint that holds one.
        state = {name: tensor for name, tensor in state.items() if name not in VOCABULARY_TENSORS}
    if layout == "plain":
        problems = _plain_problems(geometry, taps)
        if problems:
            raise ConfigError(problems)
        config, notes = _plain(geometry, taps, target, layer), _plain_notes(taps, target)
        return DraftFiles(config=config, tensors=dict(state), notes=notes)
    config = _speculators(geometry, taps, target, layer, tokens=min(5, algorithm.options.unroll))
    prefix = layer_prefix(config)
    return DraftFiles(config=config, tensors={name.replace(OURS, prefix): value for name, value in state.items()})


def layouts(geometry: Geometry, taps: tuple[int, ...]) -> tuple[str, ...]:
    """Those that can hold such a draft; plain first, since both engines read it."""
    return LAYOUTS[1:] if _plain_problems(geometry, taps) else LAYOUTS


def _plain_problems(geometry: Geometry, taps: tuple[int, ...]) -> list[Problem]:
    problems = []
    if len(taps) != ENGINE_TAPS:
        problems.append(
            Problem(
                field="draft.taps",
                value=list(taps),
                message="SGLang serves plain EAGLE-3 drafts of exactly three taps",
                remedy="train with three taps, or export with --format vllm",
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


def _plain_notes(taps: tuple[int, ...], target: TargetSpec) -> tuple[str, ...]:
    if taps == default_taps(target.num_layers):
        return ()
    return (
        f"only SGLang taps the layers {list(taps)} for it: vLLM reads the plain layout's explicit list as one layer "
        "lower each, and the draft would be accepted rarely. For vLLM: torchspec export --format vllm",
    )


def _layer_config(geometry: Geometry, dtype: str) -> dict[str, Any]:
    """The Llama fields. Rope is written for both kinds of reader: newer ones take `rope_parameters`, older ones
    `rope_theta` with `rope_scaling`, which must be null (and never {"rope_type": "default"}) for plain rotary."""
    rope = dict(geometry.rope_parameters)
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "model_type": "llama",
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": geometry.num_attention_heads,
        "num_key_value_heads": geometry.num_key_value_heads,
        "head_dim": geometry.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": geometry.rms_norm_eps,
        "max_position_embeddings": geometry.max_position_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None,
        "rope_parameters": rope,
        "vocab_size": geometry.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def _plain(geometry: Geometry, taps: tuple[int, ...], target: TargetSpec, layer: Mapping[str, Any]) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer,
        "draft_vocab_size": geometry.draft_vocab_size,
        "target_hidden_size": geometry.target_hidden_size,
        "norm_before_residual": geometry.norm_before_residual,
        "eagle_config": {"use_aux_hidden_state": True},
        "torchspec": {"tap_layers": list(taps)},
    }
    if taps != default_taps(target.num_layers):
        config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = list(taps)
    return config


def _speculators(
    geometry: Geometry, taps: tuple[int, ...], target: TargetSpec, layer: Mapping[str, Any], tokens: int
) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": str(target.path), "architectures": [target.architecture]},
        },
        "transformer_layer_config": dict(layer),
        "draft_vocab_size": geometry.draft_vocab_size,
        "target_hidden_size": geometry.target_hidden_size,
        "norm_before_residual": geometry.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "eagle_aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in taps],
        "tie_word_embeddings": False,
        "torch_dtype": layer["torch_dtype"],
        "torchspec": {"tap_layers": list(taps)},
    }


def from_files(files: DraftFiles, target: TargetSpec) -> tuple[Eagle3, nn.Module]:
    """Rebuild the algorithm and its float32 draft; see `AlgorithmSpec.from_files`.

    A checkpoint of another tool that lists plain-layout taps is read in SGLang's numbering.
    """
    from torchspec.core.algorithms.eagle3.algorithm import Eagle3

    check_names(files)
    try:
        fields = geometry_fields(files.config)
        taps = _taps(files.config, fields)
    except ValueError as error:
        raise CheckpointError(f"config.json of the draft: {error}") from error
    options = Eagle3Options(taps=taps, norm_before_residual=_norm_before_residual(files.config))
    try:
        geometry, taps_used = derive(options, target, fields)
    except ConfigError as error:
        listed = "\n".join(f"  - {problem}" for problem in error.problems)
        raise CheckpointError(f"this draft does not fit the target {target.path}:\n{listed}") from error
    vocabulary = _vocabulary(files.tensors, geometry)
    draft = Eagle3Draft(geometry, vocabulary)
    state = {name.replace(layer_prefix(files.config), OURS): value for name, value in files.tensors.items()}
    state |= {"d2t": vocabulary.d2t_N, "t2d": vocabulary.t2d_V}
    if not geometry.owns_embedding and "embed_tokens.weight" in state:
        _check_embedding(state.pop("embed_tokens.weight"), target)
    _check_shapes(draft, state)
    draft.load_state_dict({name: _wide(value) for name, value in state.items()})
    options = options.model_copy(update={"taps": taps_used, "vocab_size": vocabulary.size})
    return Eagle3(options=options, target=target, geometry=geometry, taps=taps_used), draft


def _taps(config: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    ours = layers_listed(object_at(config, "torchspec"), "tap_layers")
    if ours is not None:
        return ours
    if "taps" in fields:
        return tuple(fields["taps"])
    return layers_listed(object_at(config, "eagle_config"), "eagle_aux_hidden_state_layer_ids")


def _norm_before_residual(config: Mapping[str, Any]) -> bool:
    """Where the flag is missing, vLLM takes True for the speculators layout and False for the plain one."""
    return bool(config.get("norm_before_residual", "speculators_model_type" in config))


def _vocabulary(tensors: Mapping[str, Tensor], geometry: Geometry) -> VocabularyMap:
    if "d2t" not in tensors:
        if geometry.draft_vocab_size != geometry.vocab_size:
            raise CheckpointError("the draft vocabulary is pruned, but the checkpoint holds no `d2t` map")
        return VocabularyMap.identity(geometry.vocab_size)
    vocabulary = VocabularyMap.from_offsets(tensors["d2t"], geometry.vocab_size)
    size, ids_N = vocabulary.size, vocabulary.ids_N
    lowest, highest = int(ids_N.min()), int(ids_N.max())
    ascending = bool((ids_N[1:] > ids_N[:-1]).all())
    if size != geometry.draft_vocab_size or not ascending or lowest < 0 or highest >= geometry.vocab_size:
        raise CheckpointError(
            f"the vocabulary map `d2t` ({size} entries, ids {lowest}..{highest}) does not map "
            f"{geometry.draft_vocab_size} draft tokens into the target's {geometry.vocab_size}, ascending: it belongs "
            "to another tokenizer or is damaged"
        )
    return vocabulary


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _check_embedding(stored_VH: Tensor, target: TargetSpec) -> None:
    """Many published drafts carry a copy of the target's embedding; a different one would be lost silently."""
    trusted = target.trust_remote_code
    head = load_target_head(target.path, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=trusted)
    same_shape = stored_VH.shape == head.embedding_VH.shape
    if not same_shape or not torch.allclose(stored_VH.float(), head.embedding_VH, rtol=0, atol=1e-2):
        raise CheckpointError(
            f"the draft's embed_tokens {list(stored_VH.shape)} is not the embedding of {target.path}: it was made for "
            "another target, or trained its own, which a draft of the target's hidden size does not do here"
        )


def _check_shapes(draft: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = draft.state_dict()
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    parts = wrong + [f"{name} is missing" for name in missing] + [f"{name} has no use here" for name in extra]
    if parts:
        raise CheckpointError(f"the draft's tensors do not fit its config.json: {'; '.join(parts)}")
    damaged = [n for n, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if damaged:
        raise CheckpointError(f"not finite: {', '.join(damaged)}")
