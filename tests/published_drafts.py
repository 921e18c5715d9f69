"""Directories as other tools publish drafts, of random numbers: names of files and tensors, fields of config.json.

What each was taken from stands beside it: a repository and the file in it. Sizes are those of a tiny Llama-3.1-like
target (grouped queries, an untied head, a rotary base and eps that no class has by default), so that a field that is
taken from the wrong place shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, DRAFTED, HIDDEN, INNER, LAYERS = 300, 96, 64, 80, 8
HEADS, KEYS, WIDTH = 4, 2, 16
TARGET = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": WIDTH, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
LAYER = {
    "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS, "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    "vocab_size": VOCABULARY, "tie_word_embeddings": False,
}  # fmt: skip
Tensors = dict[str, Tensor]


def save_target(directory: Path) -> None:
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**TARGET)).save_pretrained(directory)


@dataclass(frozen=True, kw_only=True)
class Published:
    """write    makes the directory, given the target's embedding, norm and head
    name     of the algorithm that is to read it
    layouts  that can hold it
    """

    write: Callable[[Path, Tensors], None]
    name: str
    layouts: tuple[str, ...] = ("plain", "speculators")


def random_norm(size: int) -> Tensor:
    return 1 + 0.2 * torch.randn(size)


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * 1.5 * columns**-0.5


def layer(prefix: str, read: int, inner: int = INNER) -> Tensors:
    """A Llama layer whose attention reads `read` values."""
    return {
        f"{prefix}self_attn.q_proj.weight": matrix(HEADS * WIDTH, read),
        f"{prefix}self_attn.k_proj.weight": matrix(KEYS * WIDTH, read),
        f"{prefix}self_attn.v_proj.weight": matrix(KEYS * WIDTH, read),
        f"{prefix}self_attn.o_proj.weight": matrix(HIDDEN, HEADS * WIDTH),
        f"{prefix}mlp.gate_proj.weight": matrix(inner, HIDDEN),
        f"{prefix}mlp.up_proj.weight": matrix(inner, HIDDEN),
        f"{prefix}mlp.down_proj.weight": matrix(HIDDEN, inner),
        f"{prefix}input_layernorm.weight": random_norm(HIDDEN),
        f"{prefix}post_attention_layernorm.weight": random_norm(HIDDEN),
    }


def eagle3(prefix: str = "midlayer.", drafted: int = DRAFTED, taps: int = 3) -> Tensors:
    torch.manual_seed(11)
    return {
        "fc.weight": matrix(HIDDEN, taps * HIDDEN),
        **layer(prefix, 2 * HIDDEN),
        f"{prefix}hidden_norm.weight": random_norm(HIDDEN),
        "norm.weight": random_norm(HIDDEN),
        "lm_head.weight": 2 * matrix(drafted, HIDDEN),
    }


def maps(drafted: int = DRAFTED) -> Tensors:
    """`d2t` in offsets and `t2d`, of tokens that are not evenly spread."""
    ids_N = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))[:drafted].sort().values
    t2d_V = torch.zeros(VOCABULARY, dtype=torch.bool)
    t2d_V[ids_N] = True
    return {"d2t": ids_N - torch.arange(drafted), "t2d": t2d_V}


def whole_maps() -> Tensors:
    return {"d2t": torch.zeros(VOCABULARY, dtype=torch.int64), "t2d": torch.ones(VOCABULARY, dtype=torch.bool)}


def blocks(layers: int = 2, taps: int = 5) -> Tensors:
    torch.manual_seed(12)
    made = {"fc.weight": matrix(HIDDEN, taps * HIDDEN), "hidden_norm.weight": random_norm(HIDDEN)}
    for number in range(layers):
        own = f"layers.{number}."
        made |= layer(own, HIDDEN)
        made |= {f"{own}self_attn.{kind}_norm.weight": random_norm(WIDTH) for kind in "qk"}
    return made | {"norm.weight": random_norm(HIDDEN)}


def written(
    directory: Path, config: dict[str, Any], tensors: Tensors, dtype: torch.dtype, name: str = "model.safetensors"
) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    stored = {key: t.to(dtype).contiguous() if t.is_floating_point() else t for key, t in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(stored, directory / name)
    elif name == "training_state.pt":
        torch.save({"draft_state_dict": stored, "global_step": 7, "epoch": 0, "strategy": "eagle3"}, directory / name)
    else:
        torch.save(stored, directory / name)


def _eagle(directory: Path, ends: Tensors) -> None:
    """SafeAILab/EAGLE eagle/traineagle3/config.json and eagle/model/cnets.py: a Llama's class, no rotary base (10000),
    float16, a pickle without the embedding, which is the target's."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **LAYER, "draft_vocab_size": DRAFTED,
              "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": True,
              "initializer_range": 0.02, "transformers_version": "4.28.1"}  # fmt: skip
    written(directory, config, {**maps(), **eagle3()}, torch.float16, "pytorch_model.bin")


SPECFORGE = {
    "architectures": ["LlamaForCausalLMEagle3"], "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": WIDTH, "initializer_range": 0.02, "max_window_layers": 48, "model_type": "llama", **LAYER,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    "use_cache": True, "use_sliding_window": False, "draft_vocab_size": DRAFTED,
}  # fmt: skip
"""sgl-project/SpecForge configs/qwen3-30B-A3B-eagle3.1.json, without its two norms."""


def _specforge(directory: Path, ends: Tensors) -> None:
    """SpecForge's epoch_X_step_Y (scripts/train_eagle3.py) and `specforge export --to sglang` (export/to_sglang.py):
    save_pretrained without the embedding."""
    written(directory, SPECFORGE, {**maps(), **eagle3()}, torch.bfloat16)


def _specforge_state(directory: Path, ends: Tensors) -> None:
    """SpecForge's {run_id}-step{N} (export/checkpoint_io.py), its draft's config.json put beside it."""
    written(directory, SPECFORGE, {**maps(), **eagle3()}, torch.bfloat16, "training_state.pt")


def _specforge_norms(directory: Path, ends: Tensors) -> None:
    """configs/qwen3-30B-A3B-eagle3.1.json; YaRN as its README's long-context examples have it, in the older fields."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = {**SPECFORGE, "fc_norm": True, "norm_output": True, "rope_scaling": yarn}
    norms = {f"fc_norm.{place}.weight": random_norm(HIDDEN) for place in range(3)}
    written(directory, config, {**maps(), **eagle3(), **norms}, torch.bfloat16)


def _legacy_norms(directory: Path, ends: Tensors) -> None:
    """What SGLang's llama_eagle3.py maps as legacy names: aux_norm_low, aux_norm_mid, aux_norm_high."""
    norms = {f"aux_norm_{place}.weight": random_norm(HIDDEN) for place in ("low", "mid", "high")}
    written(directory, {**SPECFORGE, "use_aux_norm": True}, {**maps(), **eagle3(), **norms}, torch.bfloat16)


def _angelslim(directory: Path, ends: Tensors) -> None:
    """Tencent/AngelSlim angelslim/compressor/speculative/train/configs/qwen3-8b-eagle3.json: vLLM's name, and the
    embedding beside the rest."""
    config = {**SPECFORGE, "architectures": ["Eagle3LlamaForCausalLM"]}
    written(directory, config, {**maps(), **eagle3(), "embed_tokens.weight": ends["embedding"]}, torch.float32)


def _modelopt(directory: Path, ends: Tensors) -> None:
    """NVIDIA/Model-Optimizer modelopt/torch/export/plugins/hf_spec_export.py: `layers.0`, no t2d, eagle_config."""
    inner = {"eagle_aux_hidden_state_layer_ids": [], "use_aux_hidden_state": True, "use_mtp_layernorm": False}
    config = {**SPECFORGE, "eagle_config": inner, "mlp_bias": False}
    tensors = {"d2t": maps()["d2t"], **eagle3("layers.0.")}
    written(directory, config, tensors, torch.bfloat16)


def _torchspec(directory: Path, ends: Tensors) -> None:
    """lightseekorg/TorchSpec tools/convert_to_hf.py --vllm: `layers.0`, the embedding, every token; in two shards here,
    as transformers writes large ones."""
    config = {**SPECFORGE, "draft_vocab_size": VOCABULARY, "_torchspec_version": "0.1.0", "torch_dtype": "float32"}
    tensors = {**whole_maps(), **eagle3("layers.0.", VOCABULARY), "embed_tokens.weight": ends["embedding"]}
    written(directory, config, {}, torch.float32)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, held in shards.items():
        save_file({name: tensors[name].contiguous() for name in held}, directory / file)
    places = {name: file for file, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def speculators(kind: str, tokens: int, **fields: Any) -> dict[str, Any]:
    """vllm-project/speculators src/speculators/config.py, as its pull request 53 shows a whole one."""
    greedy = {"proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "speculators_model_type": kind, "has_no_defaults_at_init": False, "torch_dtype": "float32",
        "transformers_version": "4.53.1", "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": kind, "default_proposal_method": "greedy", "proposal_methods": [greedy],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "meta-llama/Llama-3.1-8B-Instruct"},
        },
        **fields,
    }  # fmt: skip


LLAMA_LAYER = {
    "model_type": "llama", **LAYER, "attention_bias": False, "attention_dropout": 0.0, "head_dim": WIDTH,
    "initializer_range": 0.02, "mlp_bias": False, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 250000.0,
    "use_cache": True,
}  # fmt: skip


def _speculators_01(directory: Path, ends: Tensors) -> None:
    """speculators 0.1: Eagle3Speculator without layer ids, norm_before_residual, the embedding and copies of the
    target's norm and head (models/eagle3.py of that time)."""
    config = speculators(
        "eagle3", 5, architectures=["Eagle3Speculator"], auto_map={"": "eagle3.Eagle3SpeculatorConfig"},
        draft_vocab_size=DRAFTED, norm_before_residual=True, target_hidden_size=None, speculators_version="0.1.0.dev14",
        transformer_layer_config=LLAMA_LAYER,
    )  # fmt: skip
    found = maps()
    ids_N = found["d2t"] + torch.arange(DRAFTED)
    copies = {"embed_tokens.weight": ends["embedding"], "verifier_norm.weight": ends["norm"],
              "verifier_lm_head.weight": ends["head"][ids_N]}  # fmt: skip
    written(directory, config, {**found, **eagle3("layers.0."), **copies}, torch.float32)


def _speculators_06(directory: Path, ends: Tensors) -> None:
    """speculators from 0.6 on (docs/cli/train.md, models/eagle3/core.py): one norm of all taps by default, the output
    normed, layer ids in Hugging Face's numbering."""
    config = speculators(
        "eagle3", 3, architectures=["Eagle3DraftModel"], draft_vocab_size=DRAFTED, norm_before_residual=True,
        norm_before_fc=True, fc_norm=False, norm_output=True, embed_requires_grad=False, target_hidden_size=None,
        eagle_aux_hidden_state_layer_ids=[2, 3, 7], speculators_version="0.6.0", transformer_layer_config=LLAMA_LAYER,
    )  # fmt: skip
    tensors = {**maps(), **eagle3("layers.0."), "input_norm.weight": random_norm(3 * HIDDEN)}
    written(directory, config, {**tensors, "embed_tokens.weight": ends["embedding"]}, torch.float32)


QWEN3_LAYER = {
    "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "head_dim": WIDTH, **LAYER,
    "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "max_window_layers": 2, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "use_cache": True, "use_sliding_window": False,
    "initializer_range": 0.02,
}  # fmt: skip
ZLAB = {
    "architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "dtype": "bfloat16",
    **QWEN3_LAYER, "block_size": 6, "num_target_layers": LAYERS,
    "dflash_config": {"mask_token_id": 299, "target_layer_ids": [1, 2, 3, 4, 5]},
}  # fmt: skip
"""z-lab's drafts: SpecForge configs/qwen3-8b-dflash.json with the dflash_config that is published beside it, the form
that hf_spec_export.py of ModelOpt calls z-lab's."""


def _zlab(directory: Path, ends: Tensors) -> None:
    written(directory, ZLAB, blocks(), torch.bfloat16)


def _torchspec_dflash(directory: Path, ends: Tensors) -> None:
    """TorchSpec configs/draft_models/qwen3_8b_dflash.json, tools/convert_dflash_to_hf.py, models/draft/dflash.py: own
    names for three modules, no layer ids, and the frozen embedding."""
    config = {key: value for key, value in ZLAB.items() if key != "auto_map"}
    config["dflash_config"] = {"mask_token_id": 298, "target_layer_ids": None}
    ours = {"fc.": "context_proj.", "hidden_norm.": "context_norm.", "norm.": "final_norm."}
    tensors = {
        next((b + n.removeprefix(a) for a, b in ours.items() if n.startswith(a)), n): t for n, t in blocks().items()
    }
    written(directory, config, {**tensors, "embed_tokens.weight": ends["embedding"]}, torch.float32)


def _speculators_dflash(directory: Path, ends: Tensors) -> None:
    """speculators models/dflash/core.py and config.py: a pruned vocabulary with its rows of the target's head, sliding
    layers, the copies of the target's tensors that older ones had."""
    layer_config = {
        **QWEN3_LAYER,
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 9,
        "use_sliding_window": True,
    }
    found = maps()
    ids_N = found["d2t"] + torch.arange(DRAFTED)
    config = speculators(
        "dflash", 5, architectures=["DFlashDraftModel"], draft_vocab_size=DRAFTED, block_size=6, mask_token_id=299,
        aux_hidden_state_layer_ids=[2, 3, 4, 5, 6], sliding_window_non_causal=False, sample_from_anchor=False,
        speculators_version="0.6.0", transformer_layer_config=layer_config,
    )  # fmt: skip
    rows = {"lm_head.weight": ends["head"][ids_N], "verifier_lm_head.weight": ends["head"][ids_N]}
    written(directory, config, {**found, **blocks(), **rows, "verifier_norm.weight": ends["norm"]}, torch.float32)


def _specforge_dspark(directory: Path, ends: Tensors) -> None:
    """SpecForge configs/qwen3-8b-dspark.json and modeling/draft/dspark.py: the heads' fields within dflash_config."""
    inner = {
        "mask_token_id": 299, "target_layer_ids": [1, 2, 3, 4, 5], "projector_type": "dspark", "markov_rank": 8,
        "markov_head_type": "vanilla", "confidence_head_alpha": 1.0, "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }  # fmt: skip
    config = {**ZLAB, "architectures": ["DSparkDraftModel"], "dflash_config": inner}
    tensors = {**blocks(), **_dspark_heads()}
    written(directory, config, tensors, torch.bfloat16)


def _dspark_heads() -> Tensors:
    return {
        "markov_head.markov_w1.weight": torch.randn(VOCABULARY, 8),
        "markov_head.markov_w2.weight": matrix(VOCABULARY, 8),
        "confidence_head.proj.weight": matrix(1, HIDDEN + 8),
        "confidence_head.proj.bias": torch.randn(1),
    }


def _torchspec_dspark(directory: Path, ends: Tensors) -> None:
    """TorchSpec models/draft/dspark.py: `classical` for the head that all others call vanilla, at the top."""
    heads = {"markov_rank": 8, "markov_head_type": "classical", "enable_confidence_head": True,
             "confidence_head_with_markov": True}  # fmt: skip
    config = {**ZLAB, "architectures": ["DSparkDraftModel"], **heads}
    written(directory, config, {**blocks(), **_dspark_heads()}, torch.float32)


def _specforge_domino(directory: Path, ends: Tensors) -> None:
    """SpecForge configs/qwen3-8b-domino.json; heads under `logit_head`, as modeling/draft/dflash.py says that early
    ones have them."""
    inner = {
        "mask_token_id": 299, "target_layer_ids": [1, 2, 3, 4, 5], "projector_type": "domino", "emb_dim": 8,
        "gru_hidden_dim": 12, "pure_draft_prefix_len": 1, "shift_label": False,
    }  # fmt: skip
    config = {**ZLAB, "architectures": ["DominoDraftModel"], "dflash_config": inner}
    heads = {
        "logit_head.prefix_gru.weight_ih_l0": matrix(36, HIDDEN),
        "logit_head.prefix_gru.weight_hh_l0": matrix(36, 12),
        "logit_head.embed_proj.0.weight": matrix(8, HIDDEN + 12),
        "logit_head.embed_proj.2.weight": matrix(VOCABULARY, 8),
    }
    written(directory, config, {**blocks(), **heads}, torch.bfloat16)


def peagle(prefix: str = "layers.0.") -> Tensors:
    torch.manual_seed(13)
    return {**eagle3(prefix), **layer("layers.1.", HIDDEN), "mask_hidden": torch.randn(1, 1, 3 * HIDDEN)}


def _specforge_peagle(directory: Path, ends: Tensors) -> None:
    """SpecForge configs/qwen3-8b-peagle.json and modeling/draft/peagle.py; the token for masks, which its configs leave
    out, as vLLM wants it."""
    config = {**SPECFORGE, "architectures": ["PEagleDraftModel"], "num_hidden_layers": 2, "ptd_token_id": 299}
    written(directory, config, {**maps(), **peagle(), "embed_tokens.weight": ends["embedding"]}, torch.bfloat16)


def _speculators_peagle(directory: Path, ends: Tensors) -> None:
    """speculators models/peagle."""
    config = speculators(
        "peagle", 4, architectures=["PEagleDraftModel"], draft_vocab_size=DRAFTED, norm_before_residual=True,
        norm_before_fc=False, mask_token_id=299, eagle_aux_hidden_state_layer_ids=[2, 4, 5],
        speculators_version="0.6.0", transformer_layer_config={**LLAMA_LAYER, "num_hidden_layers": 2},
    )  # fmt: skip
    written(directory, config, {**maps(), **peagle()}, torch.float32)


PUBLISHED = {
    "eagle": Published(write=_eagle, name="eagle3"),
    "specforge": Published(write=_specforge, name="eagle3"),
    "specforge-state": Published(write=_specforge_state, name="eagle3"),
    "specforge-eagle3.1": Published(write=_specforge_norms, name="eagle3.1"),
    "legacy-norms": Published(write=_legacy_norms, name="eagle3.1"),
    "angelslim": Published(write=_angelslim, name="eagle3"),
    "modelopt": Published(write=_modelopt, name="eagle3"),
    "torchspec": Published(write=_torchspec, name="eagle3"),
    "speculators-0.1": Published(write=_speculators_01, name="eagle3", layouts=("speculators",)),
    "speculators-0.6": Published(write=_speculators_06, name="eagle3.1", layouts=("speculators",)),
    "z-lab": Published(write=_zlab, name="dflash"),
    "torchspec-dflash": Published(write=_torchspec_dflash, name="dflash"),
    "speculators-dflash": Published(write=_speculators_dflash, name="dflash", layouts=("speculators",)),
    "specforge-dspark": Published(write=_specforge_dspark, name="dspark"),
    "torchspec-dspark": Published(write=_torchspec_dspark, name="dspark"),
    "specforge-domino": Published(write=_specforge_domino, name="domino", layouts=("plain",)),
    "specforge-peagle": Published(write=_specforge_peagle, name="peagle", layouts=("speculators",)),
    "speculators-peagle": Published(write=_speculators_peagle, name="peagle", layouts=("speculators",)),
}
