"""P-EAGLE drafts in the speculators layout, which vLLM serves without another argument, and back; those of others in
the layout before it (`peagle.plain`) are read too.

Tapped layers are stored as l + 1, where ours is l: vLLM reads Hugging Face indices. Other engines read no P-EAGLE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchspec.core.algorithms.peagle.geometry import PEagleGeometry, derive, geometry_fields
from torchspec.core.algorithms.peagle.model import PEagleDraft
from torchspec.core.algorithms.peagle.options import PEagleOptions
from torchspec.core.algorithms.peagle.plain import files_as_speculators
from torchspec.core.algorithms.peagle.serving import VOCABULARY_TENSORS, check_names
from torchspec.core.errors import CheckpointError, ConfigError, Problem
from torchspec.core.export.draft_config import llama_fields, speculators_fields
from torchspec.core.export.draft_tensors import check_embedding, load_stored, read_vocabulary
from torchspec.core.interfaces.algorithm import DraftFiles
from torchspec.core.interfaces.engine import TargetSpec

if TYPE_CHECKING:
    from torchspec.core.algorithms.peagle.algorithm import PEagle

LAYOUTS = ("speculators",)
ENGINE_TAPS = 3


def to_files(algorithm: PEagle, state: Mapping[str, Tensor], layout: str) -> DraftFiles:
    """The draft in a published layout. Raises ConfigError for one whose readers could not serve it."""
    if layout not in LAYOUTS:
        problem = Problem(
            field="layout",
            value=layout,
            message="no engine that reads this layout drafts as P-EAGLE does",
            choices=LAYOUTS,
            remedy="export with --format vllm",
        )
        raise ConfigError([problem])
    geometry = algorithm.geometry
    if geometry.draft_vocab_size == geometry.vocab_size:
        # Of a vocabulary that was not pruned vLLM has no map, and refuses a checkpoint that holds one.
        state = {name: tensor for name, tensor in state.items() if name not in VOCABULARY_TENSORS}
    dtype = str(state["fc.weight"].dtype).removeprefix("torch.")
    layer = llama_fields(geometry, geometry.vocab_size, dtype, num_layers=geometry.num_layers)
    if len(algorithm.taps) != ENGINE_TAPS:
        layer["num_aux_hidden_states"] = len(algorithm.taps)
    config = _speculators(geometry, algorithm.taps, algorithm.target, layer, algorithm.options.depths)
    return DraftFiles(config=config, tensors=dict(state), notes=_notes(algorithm.taps))


def _notes(taps: tuple[int, ...]) -> tuple[str, ...]:
    if len(taps) == ENGINE_TAPS:
        return ()
    return (
        f"vLLM loads P-EAGLE drafts of {ENGINE_TAPS} taps, and those of others from the version on that reads "
        f"num_aux_hidden_states; this one has {len(taps)}",
    )


def _speculators(
    geometry: PEagleGeometry, taps: tuple[int, ...], target: TargetSpec, layer: Mapping[str, Any], depths: int
) -> dict[str, Any]:
    return {
        "architectures": ["PEagleSpeculator"],
        **speculators_fields("peagle", target, layer, tokens=depths),
        "draft_vocab_size": geometry.draft_vocab_size,
        "target_hidden_size": geometry.target_hidden_size,
        "norm_before_residual": geometry.norm_before_residual,
        "norm_before_fc": False,
        "mask_token_id": geometry.mask_token,
        "eagle_aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in taps],
        "torchspec": {"tap_layers": list(taps)},
    }


def from_files(files: DraftFiles, target: TargetSpec) -> tuple[PEagle, nn.Module]:
    """Rebuild the algorithm and its float32 draft; see `AlgorithmSpec.from_files`."""
    from torchspec.core.algorithms.peagle.algorithm import PEagle

    try:
        files = files_as_speculators(files)
        check_names(files)
        fields = geometry_fields(files.config)
        if "mask_token" not in fields:
            raise ValueError("mask_token_id is missing: which token stands for those to be drafted is not known")
    except ValueError as error:
        raise CheckpointError(f"config.json of the draft: {error}") from error
    try:
        # Where the layer's number is missing it is one, as engines take it.
        geometry, taps = derive(PEagleOptions(), target, {"num_layers": 1, **fields})
    except ConfigError as error:
        listed = "\n".join(f"  - {problem}" for problem in error.problems)
        raise CheckpointError(f"this draft does not fit the target {target.path}:\n{listed}") from error
    vocabulary = read_vocabulary(files.tensors, geometry.draft_vocab_size, geometry.vocab_size)
    draft = PEagleDraft(geometry, vocabulary)
    state = dict(files.tensors) | {"d2t": vocabulary.d2t_N, "t2d": vocabulary.t2d_V}
    if not geometry.owns_embedding and "embed_tokens.weight" in state:
        check_embedding(state.pop("embed_tokens.weight"), target)
    load_stored(draft, state)
    options = PEagleOptions(
        taps=taps,
        vocab_size=vocabulary.size,
        num_layers=geometry.num_layers,
        mask_token=geometry.mask_token,
        norm_before_residual=geometry.norm_before_residual,
        **_depths(files.config),
    )
    return PEagle(options=options, target=target, geometry=geometry, taps=taps), draft


def _depths(config: Mapping[str, Any]) -> dict[str, int]:
    """As many as the config has an engine draft."""
    try:
        (method, *_) = config["speculators_config"]["proposal_methods"]
        tokens = method["speculative_tokens"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {"depths": tokens} if type(tokens) is int and tokens >= 2 else {}
