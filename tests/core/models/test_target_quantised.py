"""Quantised weights and ends of a target, against the numbers that each form says they stand for.

Products of a code and a scale are exact in float64, and rounded once in float32: they must be the same, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from torchspec.core import registry
from torchspec.core.errors import TargetError
from torchspec.core.interfaces.target import VocabularyShards
from torchspec.core.models import target_weights
from torchspec.core.models.target_head import load_target_head, load_target_head_shard
from torchspec.core.models.target_quantisation import described, read_quantisation, unread
from torchspec.core.models.target_spec import read_target_spec
from torchspec.core.models.target_weights import TargetWeights, weights_fingerprint

CPU = torch.device("cpu")
FORMS = (
    "fp8", "fp8-tensor", "fbgemm", "modelopt", "ct-fp8", "ct-fp8-block", "ct-int8", "ct-w4a16", "ct-w4a16-asym",
    "ct-w8a16", "gptq", "gptq-int8", "gptq-v2", "awq",
)  # fmt: skip
NAME = "layers.0.mlp.up_proj.weight"
Write = Callable[..., TargetWeights]


def read(weights: TargetWeights, name: str = NAME, rows: tuple[int, int] | None = None) -> Tensor:
    return weights.read(name, dtype=torch.float32, device=CPU, rows=rows)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(settings, tensors): a directory whose only weight is NAME, with these parts."""

    def made(settings: dict[str, Any] | None, tensors: dict[str, Tensor], **config: Any) -> TargetWeights:
        said = {} if settings is None else {"quantization_config": settings}
        (tmp_path / "config.json").write_text(json.dumps({**said, **config}))
        save_file(
            {f"{NAME.removesuffix('.weight')}.{part}": value.contiguous() for part, value in tensors.items()},
            tmp_path / "model.safetensors",
        )
        return TargetWeights.open(tmp_path)

    return made


def settings_of(form: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", **form.settings}


def test_every_form_is_tested(quantised_targets: ModuleType) -> None:
    assert tuple(quantised_targets.FORMS) == (*FORMS, "mxfp4")


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_worth_what_its_form_says(form: str, write: Write, quantised_targets: ModuleType) -> None:
    found = quantised_targets.FORMS[form]
    torch.manual_seed(1)
    made = found.make(0.1 * torch.randn(56, 64))
    weights = write(settings_of(found), made.tensors)
    assert list(weights.files) == [NAME]
    assert weights.shape(NAME) == (56, 64)
    whole = read(weights)
    assert torch.equal(whole, made.worth.float())
    for rows in ((0, 56), (3, 11), (8, 16), (39, 41), (55, 56), (7, 7)):
        assert torch.equal(read(weights, rows=rows), whole[slice(*rows)])
    half = weights.read(NAME, dtype=torch.bfloat16, device=CPU)
    assert torch.equal(half, made.worth.float().bfloat16())
    assert weights.read(NAME, dtype=torch.float32, device=torch.device("meta"), rows=(3, 11)).shape == (8, 64)


@pytest.mark.parametrize("form", ["fp8", "ct-w4a16-asym", "gptq", "awq"])
def test_a_weight_may_be_dequantised_in_pieces(
    form: str, write: Write, quantised_targets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = quantised_targets.FORMS[form]
    made = found.make(0.1 * torch.randn(56, 64))
    monkeypatch.setattr(target_weights, "AT_ONCE", 5 * 64)
    weights = write(settings_of(found), made.tensors)
    assert torch.equal(read(weights), made.worth.float())
    assert torch.equal(read(weights, rows=(3, 50)), made.worth[3:50].float())


def test_experts_in_four_bits(quantised_targets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All together in one tensor, which lies with inputs and outputs swapped."""
    form, name = quantised_targets.FORMS["mxfp4"], "layers.0.mlp.experts.down_proj"
    made = form.make(0.5 * torch.randn(3, 64, 5))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": form.settings}))
    save_file({f"{name}_{part}": value for part, value in made.tensors.items()}, tmp_path / "model.safetensors")
    weights = TargetWeights.open(tmp_path)
    assert list(weights.files) == [name]
    assert weights.shape(name) == (3, 64, 5)
    assert torch.equal(read(weights, name), made.worth.float())
    monkeypatch.setattr(target_weights, "AT_ONCE", 1)
    assert torch.equal(read(weights, name, rows=(1, 3)), made.worth[1:].float())


def test_the_last_word_of_a_row_may_be_half_empty(write: Write, quantised_targets: ModuleType) -> None:
    form = quantised_targets.packed(quantised_targets.Grouped(bits=4, size=20))
    made = form(0.1 * torch.randn(5, 20))
    assert made.tensors["weight_packed"].shape == (5, 3)
    settings = quantised_targets.compressed("pack-quantized", num_bits=4, strategy="channel")
    assert torch.equal(read(write(settings, made.tensors)), made.worth.float())


def test_a_zero_point_of_zero_is_stored_as_all_ones(write: Write) -> None:
    """GPTQ's older form stores it less one, in as many bits as it has."""
    tensors = {
        "qweight": torch.tensor([[0x76543210]], dtype=torch.int32).expand(1, 8),
        "qzeros": torch.full((1, 1), -1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    weights = write({"quant_method": "gptq", "bits": 4, "group_size": 8}, tensors)
    assert read(weights).tolist() == [list(range(8))] * 8


def test_scales_that_are_powers_of_two_in_a_byte(write: Write) -> None:
    """DeepSeek-V3.1 and later: `scale_fmt: ue8m0`."""
    codes = torch.arange(1, 17).float().reshape(4, 4).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.25, 4.0], [1.0, 0.5]]).to(torch.float8_e8m0fnu)
    settings = {"quant_method": "fp8", "weight_block_size": [2, 2], "scale_fmt": "ue8m0"}
    weights = write(settings, {"weight": codes, "weight_scale_inv": scales})
    spread = torch.tensor([[0.25, 0.25, 4, 4], [0.25, 0.25, 4, 4], [1, 1, 0.5, 0.5], [1, 1, 0.5, 0.5]])
    assert torch.equal(read(weights), codes.float() * spread)


FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8]}
CODES = torch.zeros(16, 16).to(torch.float8_e4m3fn)
WORDS = torch.zeros(2, 16, dtype=torch.int32)


@pytest.mark.parametrize(
    ("settings", "tensors", "reason"),
    [
        (FP8, {"weight": CODES, "weight_scale_inv": torch.ones(2, 3)}, r"scales of \[2, 3\] in F32 .*do not fit"),
        (FP8, {"weight": CODES, "weight_scale_inv": torch.ones(2, 2, 1)}, r"scales of \[2, 2, 1\]"),
        (
            {"quant_method": "fp8"},
            {"weight": CODES, "weight_scale_inv": torch.ones(2, 2)},
            r"scales of \[2, 2\] .*as fp8 has them",
        ),
        (
            FP8,
            {"weight": CODES, "weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8)},
            r"scales of \[2, 2\] in U8",
        ),
        ({"quant_method": "gptq", "bits": 4}, {"qweight": WORDS}, "without its qzeros, scales"),
        (
            {"quant_method": "mxfp4"},
            {"gate_up_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)},
            r"gate_up_proj_scales of \[\], which are no blocks of 32 codes",
        ),
        (
            {"quant_method": "gptq", "bits": 4},
            {"qweight": WORDS, "qzeros": WORDS[:, :3], "scales": torch.ones(2, 16)},  # six bits
            "in 2 groups, which is no gptq weight of 2 or 4 or 8 bits",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            {"weight_packed": WORDS.T, "weight_scale": torch.ones(16, 1), "weight_shape": torch.tensor([16, 99])},
            "is no packed weight of 2 or 4 or 8 bits",
        ),
    ],
    ids=["blocks", "dimensions", "no blocks", "scales", "parts", "experts", "bits", "shape"],
)
def test_parts_that_do_not_belong_together_are_refused(
    settings: dict[str, Any], tensors: dict[str, Tensor], reason: str, write: Write
) -> None:
    """By whoever needs them: an engine may know more."""
    weights = write(settings, tensors)
    with pytest.raises(TargetError, match=rf"model\.safetensors: .*{reason}.*Dequantise the target first"):
        weights.check_readable()
    (codes,) = weights.faults
    with pytest.raises(TargetError, match=reason):
        read(weights, codes)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (None, "of which config.json says nothing"),
        ({"quant_method": "fp8"}, "without the scales that fp8 has"),
        ({"quant_method": "hqq"}, r"that torchspec does not read \(quant_method hqq\)"),
    ],
)
def test_codes_alone_are_no_weights(settings: dict[str, Any] | None, reason: str, write: Write) -> None:
    weights = write(settings, {"weight": CODES})
    with pytest.raises(TargetError, match=rf"up_proj\.weight is stored as float8_e4m3fn, a quantised form {reason}"):
        read(weights)
    with pytest.raises(TargetError, match=reason):
        weights.check_readable()


def test_what_is_stored_in_full_is_left_alone(write: Write, quantised_targets: ModuleType) -> None:
    """A checkpoint that was calibrated alone has scales beside whole weights (`quantization_status: frozen`)."""
    weight = torch.randn(16, 16)
    settings = quantised_targets.compressed("float-quantized", num_bits=8, strategy="channel")
    weights = write(settings, {"weight": weight, "weight_scale": torch.full((16, 1), 3.0)})
    assert torch.equal(read(weights), weight)
    weights.check_readable()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method bitsandbytes"),
        ({"load_in_8bit": True}, "quant_method unnamed"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo NVFP4 of modelopt"),
        ({"quant_method": "gptq", "bits": 3}, "gptq of 3 bits in the form gptq"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq of 4 bits in the form marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq of 4 bits in version gemv"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "compressed-tensors in the form nvfp4-pack-quantized",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors in the form sparse-24-bitmask",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"group_0": {"format": "pack-quantized"}, "group_1": {"format": "mxfp8-quantized"}},
            },
            "compressed-tensors in the form mxfp8-quantized",
        ),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}}, "with transforms"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_forms_that_are_not_read_are_named(settings: dict[str, Any], reason: str, write: Write) -> None:
    weights = write(settings, {"qweight": WORDS})
    assert weights.quantisation is not None
    assert reason in (unread(weights.quantisation) or "")
    assert not weights.quantised


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("fp8", "fp8, blocks of 40 x 24"),
        ("fp8-tensor", "fp8"),
        ("ct-fp8", "compressed-tensors, float-quantized, 8 bits"),
        ("ct-w4a16", "compressed-tensors, pack-quantized, 4 bits, groups of 16"),
        ("gptq", "gptq, 4 bits, groups of 16"),
        ("awq", "awq, 4 bits, groups of 16"),
    ],
)
def test_forms_in_words(form: str, text: str, quantised_targets: ModuleType) -> None:
    assert described(settings_of(quantised_targets.FORMS[form])) == text


def test_where_a_directory_says_so(tmp_path: Path) -> None:
    assert read_quantisation(tmp_path) is None
    for config, found in (
        ({"quantization_config": {"quant_method": "gptq"}}, {"quant_method": "gptq"}),
        ({"compression_config": {"format": "dense"}}, {"quant_method": "compressed-tensors", "format": "dense"}),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, {"quant_method": "awq"}),
        ({"quantization_config": {}}, None),
        ({"quantization_config": None, "text_config": None}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_quantisation(tmp_path) == found
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert read_quantisation(tmp_path) == {"quant_method": "modelopt", "quant_algo": "FP8"}


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_target_head(path, dtype=dtype, device=CPU)


@pytest.mark.parametrize("form", ["fp8", "ct-w4a16", "gptq"])
def test_ends_stay_in_the_precision_that_they_are_stored_in(
    form: str, tiny_llama: Path, tmp_path: Path, quantised_targets: ModuleType
) -> None:
    quantised, _ = quantised_targets.quantise(tiny_llama, tmp_path, form)
    spec = read_target_spec(quantised)
    assert spec.dtype == (torch.float16 if form == "gptq" else torch.bfloat16)
    assert spec.quantisation == quantised_targets.FORMS[form].settings
    stored = load_file(quantised / "model.safetensors")
    head = load(quantised, spec.dtype)
    assert head.head_VH.dtype == head.embedding_VH.dtype == spec.dtype
    assert torch.equal(head.head_VH, stored["lm_head.weight"])
    assert torch.equal(head.embedding_VH, stored["model.embed_tokens.weight"])
    assert torch.equal(head.final_norm.weight, stored["model.norm.weight"])


@pytest.mark.parametrize("form", ["fp8", "ct-fp8", "ct-w4a16-asym", "gptq-v2"])
def test_quantised_ends_are_dequantised(
    form: str, tiny_llama: Path, tmp_path: Path, quantised_targets: ModuleType
) -> None:
    """300 rows, which neither blocks nor words divide; whole, and cut for one of three ranks."""
    ends = ("lm_head.weight", "model.embed_tokens.weight")
    chosen = ends if not form.startswith("gptq") else ()  # eight zero points fill a word
    quantised, floats = quantised_targets.quantise(tiny_llama, tmp_path, form, chosen=lambda name: name in chosen)
    found, expected = load(quantised), load(floats)
    assert torch.equal(found.head_VH, expected.head_VH)
    assert torch.equal(found.embedding_VH, expected.embedding_VH)
    shards = VocabularyShards(
        group=dist.ProcessGroup(1, 3), communication=registry.load_device("cpu").communication, target_size=300
    )
    part = load_target_head_shard(quantised, shards, dtype=torch.float32, device=CPU)
    assert torch.equal(part.shard_VH, expected.head_VH[100:200])
    ids = torch.tensor([299, 3, 3, 150, 0])
    assert torch.equal(part.rows(ids), expected.head_VH[ids])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            r"It is quantised: lm_head\.weight_packed is .* without its weight_scale, weight_shape",
        ),
        ({"quant_method": "hqq"}, r"quantised in a form that torchspec does not read \(quant_method hqq\)"),
    ],
)
def test_a_head_that_cannot_be_read_is_named_with_its_form(
    settings: dict[str, Any], reason: str, tiny_llama: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file({**tensors, "lm_head.weight_packed": WORDS}, copy / "model.safetensors")
    with pytest.raises(TargetError, match=rf"output head .* was not found.*{reason}"):
        load(copy)


def test_a_quantised_target_is_another_target(tiny_llama: Path, tmp_path: Path, quantised_targets: ModuleType) -> None:
    """Even where only what is said of the same bytes differs."""
    quantised, floats = quantised_targets.quantise(tiny_llama, tmp_path, "fp8")
    other = shutil.copytree(quantised, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [24, 24]
    (other / "config.json").write_text(json.dumps(config))
    known = [weights_fingerprint(path) for path in (tiny_llama, quantised, floats, other)]
    assert len(set(known)) == 4
    assert weights_fingerprint(shutil.copytree(quantised, tmp_path / "copy")) == known[1]
