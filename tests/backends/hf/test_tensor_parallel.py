"""Targets split over 2 and 4 real ranks against the same targets in one process.

Everything a rank is told must be the same on every rank, bit for bit, and that of one process up to rounding: relative
to the largest value 1e-5 in float32, 1e-6 in float64 (norms and rotary angles are in float32 inside the models) and
0.05 in bfloat16. A sum left out, a wrong head or a bias added twice differs by 0.15 and more.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from torchspec.backends.api import TargetError
from torchspec.backends.hf.engine import HfEngine
from torchspec.backends.hf.split_plan import bounds, matches, split_plan
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.registry import backends

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
# Neither the vocabulary nor the intermediate size is divisible by 2.
SHAPE: dict[str, Any] = {
    "vocab_size": 301, "hidden_size": 64, "intermediate_size": 97, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 299,
    "pad_token_id": 298,
}  # fmt: skip
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **SHAPE, head_dim=16, sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=20.0
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[0]
    ),
    "few-heads": Qwen3Config(**{**SHAPE, "num_key_value_heads": 2}, head_dim=16),
    "misfit": Qwen3Config(**SHAPE, head_dim=16),
}
PRECISIONS = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 0.05}
CASES = [
    *((name, 2, "float32") for name in ("llama", "qwen2", "qwen3", "qwen3-tied", "gemma2", "qwen3-moe")),
    ("llama", 4, "float64"),
    ("qwen2", 4, "float32"),
    ("qwen3-tied", 4, "bfloat16"),
    ("qwen3-quantised", 2, "float32"),
    ("qwen3-moe-quantised", 2, "float32"),
]


def save(config: PreTrainedConfig, directory: Path) -> Path:
    """A random model of this configuration, its norms and biases off their defaults, in several files."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(directory, max_shard_size="100KB")
    return directory


@dataclass
class Runs:
    worker: ModuleType
    targets: dict[str, Path]
    results: Path

    def rank(self, name: str, size: int, dtype: str, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What this rank was told: tensors, and texts or the reason of a refusal."""
        file = self.results / f"{name}-{dtype}-{size}-{rank}"
        found = json.loads(file.with_name(file.name + ".json").read_text())
        return load_file(file) if file.exists() else {}, found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, quantised_targets: ModuleType) -> Runs:
    directory = tmp_path_factory.mktemp("tensor-parallel")
    targets = {name: save(config, directory / name) for name, config in MODELS.items()}
    for name in ("qwen3", "qwen3-moe"):
        targets[f"{name}-quantised"], _ = quantised_targets.quantise(targets[name], directory / f"of-{name}", "fp8")
    misfit = targets["misfit"] / "config.json"
    misfit.write_text(json.dumps({**json.loads(misfit.read_text()), "intermediate_size": 101}))
    cells = [
        {"name": f"{name}-{dtype}", "size": size, "dtype": dtype, "target": str(targets[name])}
        for name, size, dtype in [*CASES, *((name, 4, "float32") for name in ("few-heads", "misfit"))]
    ]
    results = directory / "results"
    results.mkdir()
    (directory / "cells.json").write_text(json.dumps(cells))
    subprocess.run([sys.executable, str(WORKER), str(directory / "cells.json"), str(results)], check=True, timeout=300)
    spec = importlib.util.spec_from_file_location("tensor_parallel_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = worker
    spec.loader.exec_module(worker)
    return Runs(worker=worker, targets=targets, results=results)


@pytest.mark.parametrize(("name", "size", "dtype"), CASES)
def test_every_rank_is_told_what_one_process_computes(
    name: str, size: int, dtype: str, runs: Runs, load_hf: Callable[..., HfEngine]
) -> None:
    engine = load_hf(runs.targets[name], dtype=dtype)
    expected = runs.worker.ask(engine)
    first, said = runs.rank(name, size, dtype, 0)
    assert first.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        assert first[key].dtype == tensor.dtype
        error = (first[key].double() - tensor.double()).abs().max() / tensor.double().abs().max()
        assert error < PRECISIONS[dtype], f"{key}: {error}"
    if dtype != "bfloat16":
        assert {key: said[key] for key in expected.texts} == expected.texts
    for rank in range(1, 4):
        tensors, also_said = runs.rank(name, size, dtype, rank)
        assert all(torch.equal(tensors[key], tensor) for key, tensor in first.items())
        assert {key: also_said[key] for key in expected.texts} == {key: said[key] for key in expected.texts}
    assert said["vocabulary"] == 301


@pytest.mark.parametrize(("name", "size", "dtype"), CASES)
def test_a_rank_holds_its_share_of_the_layers(
    name: str, size: int, dtype: str, runs: Runs, load_hf: Callable[..., HfEngine]
) -> None:
    """All of a matrix is on some rank, once; norms, routers and biases added after a sum are on each."""
    layers = load_hf(runs.targets[name])._target.layers
    parameters = [parameter for layer in layers for parameter in layer.named_parameters()]
    repeated = ("mlp.gate.weight", "o_proj.bias", "down_proj.bias")
    on_each = sum(value.numel() for key, value in parameters if "norm" in key or key.endswith(repeated))
    whole = sum(value.numel() for _, value in parameters)
    held = [runs.rank(name, size, dtype, rank)[1]["held"] for rank in range(size)]
    assert sum(held) == whole - on_each + size * on_each
    assert max(held) < 1.1 * whole / size


def test_more_ranks_than_key_value_heads_are_refused(runs: Runs) -> None:
    for rank in range(4):
        tensors, found = runs.rank("few-heads", 4, "float32", rank)
        assert not tensors
        assert "8 query and 2 key/value heads, which 4 ranks cannot share evenly" in found["error"]
        assert found["error"].endswith("may be 1, 2")


def test_weights_of_another_shape_are_refused(runs: Runs) -> None:
    """An intermediate size of 101 is configured, one of 97 stored; no rank may fill up the rest at random."""
    for rank in range(4):
        tensors, found = runs.rank("misfit", 4, "float32", rank)
        assert not tensors
        assert (
            "6 parameters of Qwen3ForCausalLM are missing from the checkpoint or have another shape" in found["error"]
        )
        assert "If target.tensor_parallel=1 loads them, this architecture cannot be split" in found["error"]


def test_sizes_are_known_without_loading(runs: Runs) -> None:
    sizes = backends().spec("hf").tensor_parallel_sizes
    assert sizes is not None
    assert sizes(read_target_spec(runs.targets["llama"])) == (1, 2, 4)
    assert sizes(read_target_spec(runs.targets["few-heads"])) == (1, 2)
    with pytest.raises(TargetError, match=r"Qwen2ForCausalLM.*may be 1, 2, 4$"):
        split_plan(read_target_spec(runs.targets["qwen2"])).check_size(3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(n_embd=32, n_head=4, n_layer=1), "GPT2LMHeadModel .*has no tensor-parallel plan"),
        (Olmo2Config(**SHAPE), "Olmo2ForCausalLM .*asks for colwise_gather_output, rowwise_split_input"),
        (
            Qwen2MoeConfig(**SHAPE, num_experts=4, shared_expert_intermediate_size=33),
            r"Qwen2MoeForCausalLM .*not divided by its plan.*layers\.0\.mlp\.shared_expert",
        ),
        (
            LlamaConfig(**SHAPE, quantization_config={"quant_method": "gptq", "bits": 3}),
            "LlamaForCausalLM .*weights are quantised in a form that torchspec does not read .gptq of 3 bits",
        ),
    ],
    ids=["no plan", "other styles", "unknown modules", "quantised"],
)
def test_architectures_that_cannot_be_split_are_named(config: PreTrainedConfig, reason: str, tmp_path: Path) -> None:
    config.architectures = [reason.split()[0]]
    config.save_pretrained(tmp_path)
    sizes = backends().spec("hf").tensor_parallel_sizes
    assert sizes is not None
    with pytest.raises(TargetError, match=reason):
        sizes(read_target_spec(tmp_path))


def test_parts_cover_everything_once() -> None:
    for extent in (1, 7, 8, 301):
        for size in (1, 2, 3, 4):
            parts = [bounds(extent, rank, size) for rank in range(size)]
            assert [index for start, end in parts for index in range(start, end)] == list(range(extent))
            lengths = [end - start for start, end in parts]
            assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("model.layers.11.mlp.up_proj", True),
        ("layers.0.mlp.up_proj", True),
        ("model.layers.x.mlp.up_proj", False),
        ("model.layers.1.mlp.up_proj.extra", False),
        ("model.sublayers.1.mlp.up_proj", False),
        ("model.layers.1.mlp.experts.0.up_proj", False),
    ],
)
def test_names_that_a_plan_means(name: str, meant: bool) -> None:
    assert matches("layers.*.mlp.up_proj", name) == meant
