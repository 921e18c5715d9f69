"""Embedding, norm and head read from safetensors, against transformers' own model of the same directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from torchspec.core import registry
from torchspec.core.errors import TargetError
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.models import target_head, target_weights
from torchspec.core.models.target_head import SafetensorsTargetHead, load_target_head, load_target_head_shard
from torchspec.core.models.target_weights import TargetWeights

CPU = torch.device("cpu")
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR: dict[str, Any] = {
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
FAMILIES: list[PreTrainedConfig] = [
    LlamaConfig(**SIZES),
    Qwen3Config(**SIZES, tie_word_embeddings=True),
    Qwen3MoeConfig(**SIZES, **MOE),
    Gemma2Config(**SIZES, final_logit_softcapping=1.5),  # 1 + weight, soft cap
    Qwen3NextConfig(**SIZES, **MOE, **LINEAR),  # 1 + weight
    GraniteConfig(**SIZES, logits_scaling=3.0, embedding_multiplier=2.0),  # divides
    FalconH1Config(**SIZES, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8),
    Cohere2Config(**SIZES, logit_scale=0.3),  # LayerNorm without bias
    Llama4TextConfig(**SIZES, intermediate_size_mlp=48, num_local_experts=2),
    OlmoConfig(**SIZES),  # LayerNorm without parameters
    Olmo2Config(**SIZES),
    GPTNeoXConfig(**{**SIZES, "num_key_value_heads": 4}),  # LayerNorm with bias, head called embed_out
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96),
]
if hasattr(transformers, "HyperCLOVAXConfig"):
    FAMILIES.append(transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=3.0))  # multiplies

Save = Callable[[PreTrainedConfig], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """A directory with a random model whose norms, biases and weights are all off their defaults."""

    def write(config: PreTrainedConfig) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / config.model_type)
        return tmp_path / config.model_type

    return write


def load(path: Path, dtype: torch.dtype = torch.float32) -> SafetensorsTargetHead:
    return load_target_head(path, dtype=dtype, device=CPU)


def ends_of(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the target's final norm, what comes out, and the logits, of a few tokens."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    decoder = model.base_model if model.base_model is not model else model.model
    norm = next(
        getattr(decoder, name)
        for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f")
        if hasattr(decoder, name)
    )
    seen: list[tuple[Tensor, Tensor]] = []
    norm.register_forward_hook(lambda module, args, output: seen.append((args[0][0], output[0])))
    with torch.no_grad():
        logits = model(torch.arange(3, 14)[None]).logits[0]
    return *seen[-1], logits


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_norm_and_logits_of_every_family(config: PreTrainedConfig, save: Save) -> None:
    """1e-6 relative to logits of order 1: the same float32 operations, in nearly the same order."""
    path = save(config)
    head = load(path)
    before, after, logits = ends_of(path)
    torch.testing.assert_close(head.normed(before, "pre_norm"), after, atol=1e-6, rtol=1e-6)
    assert head.normed(after, "post_norm") is after
    torch.testing.assert_close(head.logits(after), logits, atol=2e-6, rtol=1e-6)
    rows = torch.tensor([5, 2, 90])
    torch.testing.assert_close(head.logits(after, head.head_VH[rows]), logits[:, rows], atol=2e-6, rtol=1e-6)
    assert (head.head_VH is head.embedding_VH) == config.tie_word_embeddings


def test_unknown_norm_state_is_refused(tiny_target: Path) -> None:
    with pytest.raises(ValueError, match="pre_norm or post_norm, got 'normed'"):
        load(tiny_target).normed(torch.zeros(1, 64), "normed")  # type: ignore[arg-type]


def test_dtypes(tiny_target: Path) -> None:
    """The product is made in the head's dtype, the result is float32, and float64 for float64."""
    state = torch.randn(3, 64, dtype=torch.float64)
    exact = state @ load_file(tiny_target / "model.safetensors")["model.embed_tokens.weight"].double().T
    for dtype, result, tolerance in (
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.float32, 0.2),
    ):
        head = load(tiny_target, dtype)
        assert head.embedding_VH.dtype == head.head_VH.dtype == dtype
        logits = head.logits(state)
        assert logits.dtype == result
        torch.testing.assert_close(logits.double(), exact, atol=tolerance, rtol=0)
    assert load(tiny_target, torch.bfloat16).normed(state.bfloat16(), "pre_norm").dtype == torch.bfloat16


def test_frozen(tiny_llama: Path) -> None:
    head = load(tiny_llama)
    assert not head.embedding_VH.requires_grad
    assert not head.head_VH.requires_grad
    assert not any(parameter.requires_grad for parameter in head.final_norm.parameters())


def reshard(path: Path, copy: Path) -> Path:
    """The same checkpoint as three shards and an index."""
    shutil.copytree(path, copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: files[i % 3] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, copy / file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return copy


def test_sharded_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    whole, sharded = load(tiny_llama), load(reshard(tiny_llama, tmp_path / "sharded"))
    assert torch.equal(whole.embedding_VH, sharded.embedding_VH)
    assert torch.equal(whole.head_VH, sharded.head_VH)
    state = torch.randn(2, 64)
    assert torch.equal(whole.normed(state, "pre_norm"), sharded.normed(state, "pre_norm"))


def test_only_the_ends_are_read(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = TargetWeights.read

    def spy(self: TargetWeights, name: str, **options: Any) -> Tensor:
        read.append(name)
        return original(self, name, **options)

    monkeypatch.setattr(target_weights.TargetWeights, "read", spy)
    load(tiny_llama)
    assert sorted(read) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def shards_of(rank: int, ranks: int, target_size: int = 300) -> VocabularyShards:
    """A place among ranks that are not there."""
    group = dist.ProcessGroup(rank, ranks)
    communication = registry.load_device("cpu").communication
    return VocabularyShards(group=group, communication=communication, target_size=target_size)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 300])
def test_bounds_of_a_divided_head_cover_it_once(ranks: int) -> None:
    bounds = [shards_of(0, ranks).bounds(rank) for rank in range(ranks)]
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(300))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_more_ranks_than_rows() -> None:
    with pytest.raises(ValueError, match="3 rows of a head cannot be divided over 4 ranks"):
        shards_of(0, 4, target_size=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_divided_head_reads_its_rows_alone(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(target_head, "READ_ROWS", 64)
    whole = load(tiny_llama, dtype)
    read: dict[str, int] = {}
    original = TargetWeights.read

    def spy(self: TargetWeights, name: str, **options: Any) -> Tensor:
        found = original(self, name, **options)
        read[name] = read.get(name, 0) + len(found)
        return found

    monkeypatch.setattr(target_weights.TargetWeights, "read", spy)
    ids = torch.tensor([299, 3, 3, 64, 150, 0])
    states = torch.randn(2, 64)
    for path in (tiny_llama, reshard(tiny_llama, tmp_path / "sharded")):
        parts = []
        for rank in range(3):
            read.clear()
            head = load_target_head_shard(path, shards_of(rank, 3), dtype=dtype, device=CPU)
            assert read["lm_head.weight"] == 100
            parts.append(head.shard_VH)
            assert torch.equal(head.rows(ids), whole.rows(ids))
            assert head.rows(ids[:0]).shape == (0, 64)
            assert torch.equal(head.logits(states, head.rows(ids)), whole.logits(states, whole.head_VH[ids]))
            assert torch.equal(head.embedding_VH, whole.embedding_VH)
            assert torch.equal(head.normed(states, "pre_norm"), whole.normed(states, "pre_norm"))
            with pytest.raises(AssertionError, match="no rank has the whole head"):
                head.head_VH  # noqa: B018
        assert torch.equal(torch.cat(parts), whole.head_VH)


def test_a_divided_tied_head_is_a_view_of_the_embedding(tiny_target: Path) -> None:
    head = load_target_head_shard(tiny_target, shards_of(1, 4), dtype=torch.float32, device=CPU)
    assert head.shard_VH.untyped_storage().data_ptr() == head.embedding_VH.untyped_storage().data_ptr()
    assert torch.equal(head.shard_VH, load(tiny_target).head_VH[75:150])
    assert torch.equal(head.rows(torch.tensor([299, 0])), load(tiny_target).head_VH[[299, 0]])


def test_scaling_of_a_divided_head(save: Save) -> None:
    path = save(Gemma2Config(**SIZES, final_logit_softcapping=1.5))
    head = load_target_head_shard(path, shards_of(0, 2, 96), dtype=torch.float32, device=CPU)
    products = torch.randn(3, 5)
    assert torch.equal(head.finished(products), load(path).finished(products))


def rename(path: Path, copy: Path, change: Callable[[str], str | None]) -> Path:
    """A copy with every tensor renamed; None drops it."""
    shutil.copytree(path, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file({new: tensor for name, tensor in tensors.items() if (new := change(name))}, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model.", "any.thing."])
def test_prefixes(prefix: str, tiny_llama: Path, tmp_path: Path) -> None:
    renamed = rename(tiny_llama, tmp_path / "renamed", lambda name: name.replace("model.", prefix))
    plain, other = load(tiny_llama), load(renamed)
    assert torch.equal(plain.embedding_VH, other.embedding_VH)
    assert torch.equal(plain.head_VH, other.head_VH)
    assert torch.equal(plain.final_norm.weight, other.final_norm.weight)  # type: ignore[arg-type]


def test_multimodal_target(tmp_path: Path) -> None:
    """The vision tower has norms and embeddings too; the language model's are taken."""
    text = {**SIZES, "final_logit_softcapping": 2.0}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    model.save_pretrained(tmp_path)
    head = load(tmp_path)
    language = model.model.language_model
    assert torch.equal(head.embedding_VH, language.embed_tokens.weight)
    state = torch.randn(3, 32)
    torch.testing.assert_close(head.normed(state, "pre_norm"), language.norm(state))
    assert head.softcap == 2.0


def test_copies_inside_layers_are_not_the_embedding(tiny_llama: Path, tmp_path: Path) -> None:
    """A multi-token-prediction layer carries an embedding of its own."""
    copy = shutil.copytree(tiny_llama, tmp_path / "mtp")
    tensors = load_file(copy / "model.safetensors")
    tensors["wrap.embed_tokens.weight"] = tensors.pop("model.embed_tokens.weight")
    tensors["wrap.layers.8.embed_tokens.weight"] = torch.zeros(300, 64)
    save_file(tensors, copy / "model.safetensors")
    assert torch.equal(load(copy).embedding_VH, load(tiny_llama).embedding_VH)
    tensors["other.embed_tokens.weight"] = torch.zeros(300, 64)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(TargetError, match=r"may be any of other\.embed_tokens\.weight, wrap\.embed_tokens\.weight"):
        load(copy)


def test_tied_pair_stored_once_under_either_name(tiny_target: Path, tmp_path: Path) -> None:
    swap = {"model.embed_tokens.weight": "lm_head.weight"}
    renamed = load(rename(tiny_target, tmp_path / "renamed", lambda name: swap.get(name, name)))
    assert renamed.head_VH is renamed.embedding_VH
    assert torch.equal(renamed.head_VH, load(tiny_target).head_VH)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "lm_head.weight",
            r"output head \(not tied.*for lm_head\.weight.*\[300, 64\].*model\.norm\.weight \[64\]",
        ),
        ("model.embed_tokens.weight", r"embedding was not found\. Looked for model\.embed_tokens\.weight"),
        ("model.norm.weight", r"final norm was not found\. Looked for model\.norm\.weight"),
    ],
)
def test_missing_tensor_says_what_was_looked_for(name: str, complaint: str, tiny_llama: Path, tmp_path: Path) -> None:
    broken = rename(tiny_llama, tmp_path / "broken", lambda stored: None if stored == name else stored)
    with pytest.raises(TargetError, match=complaint):
        load(broken)


def test_vocabulary_of_another_size(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    with pytest.raises(TargetError, match=r"\[320, 64\].*model\.embed_tokens\.weight \[300, 64\]"):
        load(copy)


def test_heads_that_cannot_be_reproduced_are_refused(save: Save, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="PhiForCausalLM has a bias"):
        load(save(PhiConfig(**SIZES)))
    copy = shutil.copytree(tiny_llama, tmp_path / "scaled")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "logits_scaling": 4.0}))
    with pytest.raises(TargetError, match=r"logits_scaling=4\.0 of model_type 'llama' may change"):
        load(copy)


def test_quantised_tensor_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "fp8")
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(TargetError, match=r"lm_head\.weight is stored as float8_e4m3fn, a quantised form"):
        load(copy)


def test_truncated_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """Anywhere: inside the data, inside the header, nothing at all."""
    copy = shutil.copytree(tiny_llama, tmp_path / "cut")
    content = (copy / "model.safetensors").read_bytes()
    for length in (len(content) - 100, 40, 0):
        (copy / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(TargetError, match=rf"model\.safetensors is truncated or damaged .* {length} bytes"):
            load(copy)


def test_truncated_or_missing_shard(tiny_llama: Path, tmp_path: Path) -> None:
    """Of any shard, even one that holds nothing needed here: the engine will need it."""
    copy = reshard(tiny_llama, tmp_path / "sharded")
    shard = copy / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(TargetError, match=r"00002-of-00003\.safetensors is truncated"):
        TargetWeights.open(copy)
    shard.unlink()
    with pytest.raises(TargetError, match=r"1 are not there: model-00002-of-00003\.safetensors"):
        TargetWeights.open(copy)


def test_index_of_another_download(tiny_llama: Path, tmp_path: Path) -> None:
    copy = reshard(tiny_llama, tmp_path / "sharded")
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(TargetError, match=r"model\.layers\.9\.mlp\.up_proj\.weight in model-00001"):
        TargetWeights.open(copy)
    for broken in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(broken)
        with pytest.raises(TargetError, match=r"index\.json"):
            TargetWeights.open(copy)


def test_no_weights_and_pickled_weights(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "consolidated.safetensors")
    with pytest.raises(TargetError, match=r"has no weights: .*there is consolidated\.safetensors"):
        load(copy)
    (copy / "consolidated.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(TargetError, match=r"only as pickles \(pytorch_model\.bin\).*save_pretrained"):
        load(copy)
