"""Quantised copies of a target in the forms that published checkpoints have, and the numbers that they stand for.

Everything is worked out code by code with Python's integers and floats, from the definition of each form:

    fp8           Qwen/Qwen3-0.6B-FP8, deepseek-ai/DeepSeek-V3: `weight_scale_inv` by blocks (their inference/kernel.py)
    fp8-tensor    neuralmagic/Meta-Llama-3-8B-Instruct-FP8 (AutoFP8): one scale of the weight, one of activations
    fbgemm        meta-llama/Llama-3.1-405B-Instruct-FP8
    modelopt      nvidia/Llama-3.1-8B-Instruct-FP8: `hf_quant_config.json` beside a config.json that says nothing
    ct-*          RedHatAI/*-FP8-dynamic, *-FP8-block, *-quantized.w8a8, *-quantized.w4a16 (llm-compressor)
    gptq-*        Qwen/Qwen2.5-*-Instruct-GPTQ-Int4 and -Int8 (AutoGPTQ), GPTQModel's gptq_v2
    awq           Qwen/Qwen2.5-*-Instruct-AWQ (AutoAWQ, version gemm)
    mxfp4         openai/gpt-oss-20b, whose experts alone are quantised
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Rows = list[list[int]]
E4M3 = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).double().nan_to_num().tolist()
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Made:
    """Stored tensors of one weight by their last names, and the weight [O, I] that they stand for, float64."""

    tensors: dict[str, Tensor]
    worth: Tensor


@dataclass(frozen=True, kw_only=True)
class Form:
    """`settings` is what config.json says (`beside`: another file of the directory says it). `joint` is between a
    module's name and those of its parts."""

    settings: dict[str, Any]
    make: Callable[[Tensor], Made]
    beside: str | None = None
    joint: str = "."


def worth(value: Callable[[int, int], float], outputs: int, inputs: int) -> Tensor:
    return torch.tensor([[value(o, i) for i in range(inputs)] for o in range(outputs)], dtype=torch.float64)


def scales_like(count: int, seed: int, dtype: torch.dtype) -> list[float]:
    """Unlike each other, and exact in what they are stored in."""
    drawn = random.Random(seed)
    return torch.tensor([drawn.uniform(0.5, 2.0) for _ in range(count)]).to(dtype).double().tolist()


def of_bytes(name: str, block: tuple[int, int] | None, dtype: torch.dtype, *, integers: bool = False) -> Any:
    """Codes of a byte; `block` None: one scale of all, whose shape has no axis; (1, 0): one of each row."""

    def make(weight: Tensor) -> Made:
        outputs, inputs = weight.shape
        tall, wide = (outputs, inputs) if block is None else (block[0], block[1] or inputs)
        down, across = -(-outputs // tall), -(-inputs // wide)
        unit = float(weight.abs().max()) / (100 if integers else 300)
        some = scales_like(down * across, outputs + inputs, dtype)
        scales = torch.tensor([unit * scale for scale in some], dtype=dtype).double().tolist()

        def scale(o: int, i: int) -> float:
            return scales[o // tall * across + i // wide]

        exact = worth(lambda o, i: float(weight[o, i]) / scale(o, i), outputs, inputs)
        codes = exact.round().clamp(-127, 127).to(torch.int8) if integers else exact.float().to(torch.float8_e4m3fn)
        values = (
            codes.tolist() if integers else [[E4M3[code] for code in row] for row in codes.view(torch.uint8).tolist()]
        )
        stored = torch.tensor(scales, dtype=dtype).reshape(() if block is None else (down, across))
        tensors = {"weight": codes, name: stored}
        if block is None:
            tensors["input_scale"] = torch.tensor(0.5)
        return Made(tensors=tensors, worth=worth(lambda o, i: values[o][i] * scale(o, i), outputs, inputs))

    return make


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """Codes in words of 32 bits, a scale and a zero point for each row and group of inputs."""

    bits: int
    size: int
    ordered: bool = False

    def codes(self, weight: Tensor, *, middle: bool) -> tuple[Rows, Rows, list[list[float]], list[int]]:
        """Codes [O][I], zero points [O][G], scales [O][G] exact in float16, and the group of each input."""
        outputs, inputs = weight.shape
        groups, drawn, top = inputs // self.size, random.Random(outputs * inputs), (1 << self.bits) - 1
        group = [i // self.size for i in range(inputs)]
        if self.ordered:
            drawn.shuffle(group)
        flat = scales_like(outputs * groups, inputs, torch.float16)
        unit = 2.0 ** -(self.bits + 1)
        scales = [[unit * flat[o * groups + g] for g in range(groups)] for o in range(outputs)]
        low = top // 4 + 1
        zeros = [
            [top // 2 + 1 if middle else drawn.randint(low, top - low) for _ in range(groups)] for _ in range(outputs)
        ]
        rows = weight.double().tolist()
        codes = [
            [min(top, max(0, round(rows[o][i] / scales[o][group[i]]) + zeros[o][group[i]])) for i in range(inputs)]
            for o in range(outputs)
        ]
        return codes, zeros, scales, group

    def words(self, codes: Sequence[int], order: Sequence[int] | None = None) -> list[int]:
        """Signed words; `order` names which of a word's codes has the n-th place."""
        each = 32 // self.bits
        padded = [*codes, *[0] * (-len(codes) % each)]
        words = []
        for start in range(0, len(padded), each):
            word = 0
            for place in range(each):
                word |= padded[start + (order[place] if order else place)] << (place * self.bits)
            words.append(word - (1 << 32) if word >> 31 else word)
        return words


def worth_of(codes: Rows, zeros: Rows, scales: list[list[float]], group: list[int]) -> Tensor:
    return worth(lambda o, i: (codes[o][i] - zeros[o][group[i]]) * scales[o][group[i]], len(codes), len(group))


def transposed(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def ints(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def packed(form: Grouped, *, symmetric: bool = True) -> Any:
    """compressed-tensors' pack-quantized; an uneven number of inputs leaves the last word of a row half empty."""

    def make(weight: Tensor) -> Made:
        codes, zeros, scales, group = form.codes(weight, middle=symmetric)
        tensors = {
            "weight_packed": ints([form.words(row) for row in codes]),
            "weight_scale": torch.tensor(scales, dtype=torch.float16),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = ints(transposed([form.words(column) for column in transposed(zeros)]))
        if form.ordered:
            tensors["weight_g_idx"] = ints(group)
        return Made(tensors=tensors, worth=worth_of(codes, zeros, scales, group))

    return make


def gptq(form: Grouped, *, stored_less_one: bool) -> Any:
    def make(weight: Tensor) -> Made:
        codes, zeros, scales, group = form.codes(weight, middle=stored_less_one and not form.ordered)
        stored = [[zero - stored_less_one for zero in row] for row in transposed(zeros)]
        tensors = {
            "qweight": ints(transposed([form.words(row) for row in codes])),
            "qzeros": ints([form.words(row) for row in stored]),
            "scales": torch.tensor(transposed(scales), dtype=torch.float16),
            "g_idx": ints(group),
        }
        return Made(tensors=tensors, worth=worth_of(codes, zeros, scales, group))

    return make


def awq(form: Grouped) -> Any:
    def make(weight: Tensor) -> Made:
        codes, zeros, scales, group = form.codes(weight, middle=False)
        tensors = {
            "qweight": ints([form.words(row, AWQ_ORDER) for row in transposed(codes)]),
            "qzeros": ints([form.words(row, AWQ_ORDER) for row in transposed(zeros)]),
            "scales": torch.tensor(transposed(scales), dtype=torch.float16),
        }
        return Made(tensors=tensors, worth=worth_of(codes, zeros, scales, group))

    return make


def e2m1(code: int) -> float:
    """Sign, two bits of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def mxfp4(weight: Tensor) -> Made:
    """Of experts [E, I, O], blocks of 32 inputs."""
    experts, inputs, outputs = weight.shape
    drawn, groups = random.Random(inputs), inputs // 32
    shape = (experts, outputs, groups)
    scales = torch.tensor([drawn.randint(123, 127) for _ in range(experts * outputs * groups)]).reshape(shape)
    rows = weight.double().transpose(1, 2).tolist()
    values = [e2m1(code) for code in range(16)]
    codes = [[[0] * inputs for _ in range(outputs)] for _ in range(experts)]
    worth_EIO = torch.zeros(experts, inputs, outputs, dtype=torch.float64)
    for e in range(experts):
        for o in range(outputs):
            for i in range(inputs):
                scale = 2.0 ** (int(scales[e, o, i // 32]) - 127)
                codes[e][o][i] = min(range(16), key=lambda code: abs(values[code] * scale - rows[e][o][i]))
                worth_EIO[e, i, o] = values[codes[e][o][i]] * scale
    pairs = torch.tensor(codes).reshape(*shape, 16, 2)
    tensors = {"blocks": (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8), "scales": scales.to(torch.uint8)}
    return Made(tensors=tensors, worth=worth_EIO)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


BLOCK = (40, 24)
"""Of which neither divides the sizes of the targets here."""
FORMS: dict[str, Form] = {
    "fp8": Form(
        settings={
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK),
        },
        make=of_bytes("weight_scale_inv", BLOCK, torch.float32),
    ),
    "fp8-tensor": Form(
        settings={"quant_method": "fp8", "activation_scheme": "static"},
        make=of_bytes("weight_scale", None, torch.float32),
    ),
    "fbgemm": Form(
        settings={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        make=of_bytes("weight_scale", (1, 0), torch.float32),
    ),
    "modelopt": Form(
        settings={"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        make=of_bytes("weight_scale", None, torch.float32),
        beside="hf_quant_config.json",
    ),
    "ct-fp8": Form(
        settings=compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        make=of_bytes("weight_scale", (1, 0), torch.bfloat16),
    ),
    "ct-fp8-block": Form(
        settings=compressed(
            "float-quantized", num_bits=8, type="float", strategy="block", block_structure=list(BLOCK)
        ),
        make=of_bytes("weight_scale", BLOCK, torch.bfloat16),
    ),
    "ct-int8": Form(
        settings=compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        make=of_bytes("weight_scale", (1, 0), torch.bfloat16, integers=True),
    ),
    "ct-w4a16": Form(
        settings=compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16),
        make=packed(Grouped(bits=4, size=16)),
    ),
    "ct-w4a16-asym": Form(
        settings=compressed(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False, actorder="group"
        ),
        make=packed(Grouped(bits=4, size=16, ordered=True), symmetric=False),
    ),
    "ct-w8a16": Form(
        settings=compressed("pack-quantized", num_bits=8, type="int", strategy="group", group_size=16),
        make=packed(Grouped(bits=8, size=16)),
    ),
    "gptq": Form(
        settings={"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False},
        make=gptq(Grouped(bits=4, size=16), stored_less_one=True),
    ),
    "gptq-int8": Form(
        settings={"quant_method": "gptq", "bits": 8, "group_size": 16, "sym": False, "desc_act": True},
        make=gptq(Grouped(bits=8, size=16, ordered=True), stored_less_one=True),
    ),
    "gptq-v2": Form(
        settings={
            "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True,
            "checkpoint_format": "gptq_v2",
        },
        make=gptq(Grouped(bits=4, size=16, ordered=True), stored_less_one=False),
    ),
    "awq": Form(
        settings={"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
        make=awq(Grouped(bits=4, size=16)),
    ),
    "mxfp4": Form(settings={"quant_method": "mxfp4"}, make=mxfp4, joint="_"),
}  # fmt: skip


def is_linear(name: str) -> bool:
    """What these checkpoints quantise: maps inside layers, but for the routers of experts."""
    return ".layers." in name and name.endswith("_proj.weight")


def quantise(
    target: Path, directory: Path, form: str, *, chosen: Callable[[str], bool] = is_linear
) -> tuple[Path, Path]:
    """Two targets: `target` with the weights that `chosen` names in this form, and one of float32 that is worth the
    same. What is not quantised is stored in bfloat16, in float16 beside integers of four bits."""
    found, rest = FORMS[form], torch.float16 if form.startswith(("gptq", "awq")) else torch.bfloat16
    quantised, floats = directory / form, directory / f"{form}-float"
    for copy in (quantised, floats):
        shutil.copytree(target, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    stored: dict[str, Tensor] = {}
    same: dict[str, Tensor] = {}
    for name, tensor in (item for file in target.glob("*.safetensors") for item in load_file(file).items()):
        if chosen(name):
            made = found.make(tensor)
            module = name.removesuffix(".weight")
            stored |= {f"{module}{found.joint}{part}": value.contiguous() for part, value in made.tensors.items()}
            same[name] = made.worth.float()
        else:
            stored[name] = tensor.to(rest)
            same[name] = stored[name].float()
    config = json.loads((target / "config.json").read_text())
    said = {"dtype": str(rest).removeprefix("torch.")}
    if found.beside is None:
        said["quantization_config"] = found.settings
    else:
        (quantised / found.beside).write_text(json.dumps({"producer": {}, "quantization": found.settings}))
    (quantised / "config.json").write_text(json.dumps({**config, **said}))
    save_file(stored, quantised / "model.safetensors")
    save_file(same, floats / "model.safetensors")
    return quantised, floats
