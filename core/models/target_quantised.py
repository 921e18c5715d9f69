"""Quantised weights of a published checkpoint: how they are stored, and the numbers that they stand for.

A weight is codes of 2 to 8 bits, scales, and in some forms zero points: weight = (code - zero point) * scale, a scale
being that of the tensor, of a row, or of a block of a row. What activations are rounded to is no part of it.

    scaled  `weight` in FP8 or INT8, and `weight_scale_inv` (DeepSeek-V3, Qwen3-FP8; it multiplies, whatever its name)
            or `weight_scale` (compressed-tensors float-, int- and naive-quantized, FBGEMM, ModelOpt FP8)
    packed  `weight_packed` int32 [O, I * bits / 32], lowest bits first, codes shifted by half their range;
            `weight_scale` [O, G], `weight_shape`, `weight_zero_point` packed along O, `weight_g_idx` [I]
            (`compressed_tensors/compressors/pack_quantized`, 0.20)
    gptq    `qweight` int32 [I * bits / 32, O], `qzeros` [G, O * bits / 32], `scales` [G, O], `g_idx` [I]; zero points
            are stored less one but in `checkpoint_format: gptq_v2` (AutoGPTQ `qlinear_cuda.py`, GPTQModel `convert.py`)
    awq     `qweight` int32 [I, O / 8], `qzeros` [G, O / 8], `scales` [G, O]; the eight codes of a word are those of
            columns 0 2 4 6 1 3 5 7 (AutoAWQ `awq/utils/packing_utils.py`, version `gemm`)
    mxfp4   of experts together: `X_blocks` uint8 [E, O, G, 16], the lower half of a byte first, `X_scales` uint8
            [E, O, G], powers of two; the weight X is [E, I, O] (GPT-OSS; OCP Microscaling Formats 1.0)

Shape letters: O rows of a weight (its outputs), o of them, I its inputs, G groups of inputs with one scale, E experts,
e of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchspec.core.errors import TargetError
from torchspec.core.models.target_quantisation import BITS, SCALED, described, shared_block, unread

Layout = Literal["scaled", "packed", "gptq", "awq", "mxfp4"]
Read = Callable[[str, tuple[slice, ...]], Tensor]
"""A stored tensor's values at these places; all of it for ()."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MXFP4_GROUP = 32
_MAIN: dict[str, Layout] = {"weight_packed": "packed", "qweight": "gptq"}
_BLOCKS, _SCALES = "_blocks", "_scales"
_PARTS = (
    "weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale",
    "activation_scale", "qzeros", "scales", "g_idx",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """`dtype` by the name that safetensors has for it, such as F8_E4M3. `says`: the values of a `weight_shape`."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    says: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        bits = int("".join(letter for letter in self.dtype.partition("_")[0] if letter.isdigit()) or 8)
        return bits * prod(self.shape) // 8

    @property
    def narrow(self) -> bool:
        """Of one byte, as no weight is that means what it says."""
        return self.dtype in ("U8", "I8") or self.dtype.startswith("F8")


@dataclass(frozen=True, kw_only=True)
class QuantisedWeight:
    """One weight [O, I], or [E, I, O] of experts together, and the stored tensors that make it up, by what they are
    (`qweight`, `scales`, ...).

    bits     of a code, where several share a word
    block    rows and columns that share a scale, of a scaled one
    plus     what is added to stored zero points
    """

    layout: Layout
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    bits: int = 8
    block: tuple[int, int] = (1, 1)
    plus: int = 0

    def read(self, read: Read, rows: tuple[int, int]) -> Tensor:
        """[o, I], or [e, I, O], float32: the weight's rows [start, stop), of experts together the experts."""
        if self.layout == "mxfp4":
            return _read_mxfp4(self, read, *rows)
        codes_oI, zeros_oG, scales_oG, group_I = _FORMS[self.layout](self, read, *rows)
        weight_oI, groups = codes_oI.float(), scales_oG.shape[1]
        if isinstance(group_I, int) and groups * group_I == self.shape[1]:
            weight_oGi = weight_oI.reshape(len(weight_oI), groups, group_I)
            if zeros_oG is not None:
                weight_oGi -= zeros_oG.float()[..., None]
            return weight_oGi.mul_(scales_oG.float()[..., None]).flatten(1)
        if isinstance(group_I, int):
            group_I = torch.arange(self.shape[1]) // group_I
        if zeros_oG is not None:
            weight_oI -= zeros_oG.float()[:, group_I]
        return weight_oI.mul_(scales_oG.float()[:, group_I])


def find_quantised(
    stored: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> tuple[dict[str, QuantisedWeight], dict[str, str]]:
    """Every quantised weight among these tensors, under the name that it has where nothing is quantised; and what is
    wrong with those whose parts are missing or do not belong together, by the names of their codes."""
    found: dict[str, QuantisedWeight] = {}
    faults: dict[str, str] = {}
    if unread(settings) is not None:
        return found, faults
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        parts = {part: f"{module}.{part}" for part in (kind, *_PARTS) if f"{module}.{part}" in stored}
        scaled = kind == "weight" and settings["quant_method"] in SCALED and tensor.narrow
        try:
            if scaled and ("weight_scale_inv" in parts or "weight_scale" in parts):
                found[name] = _scaled(name, stored, parts, settings)
            elif settings["quant_method"] == "mxfp4" and name.endswith(_BLOCKS):
                found[name.removesuffix(_BLOCKS)] = _mxfp4(name, stored)
            elif kind in _MAIN:
                layout: Layout = "awq" if settings["quant_method"] == "awq" else _MAIN[kind]
                found[f"{module}.weight"] = _of_words(name, layout, stored, parts, settings)
        except TargetError as fault:
            faults[name] = str(fault)
    return found, faults


def parts_of(quantised: Mapping[str, QuantisedWeight]) -> set[str]:
    """Names of the stored tensors that are no tensors of their own."""
    return {part for weight in quantised.values() for part in weight.parts.values()}


def _scaled(
    name: str, stored: Mapping[str, StoredTensor], parts: dict[str, str], settings: Mapping[str, Any]
) -> QuantisedWeight:
    shape = stored[name].shape
    scale = stored[parts[_scale_of(parts)]]
    block = shared_block(settings)
    if len(shape) == 2 and scale.dtype not in ("U8", "I8") and stored[name].dtype != "U8":
        (rows, columns), grid = shape, _as_grid(scale.shape)
        if grid is not None:
            # One scale each, one for all, or one for so many as the configuration says or the shapes leave.
            over_rows = 1 if grid[0] == rows else rows if grid[0] == 1 else block[0] if block else 0
            equal = columns // grid[1] if columns % grid[1] == 0 else 0
            over_columns = columns if grid[1] == 1 else block[1] if block else equal
            if over_rows and over_columns and grid == (-(-rows // over_rows), -(-columns // over_columns)):
                return QuantisedWeight(layout="scaled", shape=shape, parts=parts, block=(over_rows, over_columns))
    raise TargetError(
        f"{name} of {list(shape)} in {stored[name].dtype} has scales of {list(scale.shape)} in {scale.dtype} "
        f"({parts[_scale_of(parts)]}), which do not fit it as {described(settings)} has them"
    )


def _as_grid(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Scales by row blocks and column blocks."""
    if len(shape) == 2:
        return shape[0], shape[1]
    return (shape[0] if shape else 1, 1) if len(shape) < 2 else None


def _of_words(
    name: str,
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    parts: dict[str, str],
    settings: Mapping[str, Any],
) -> QuantisedWeight:
    """Of codes in words of 32 bits. How many bits each has follows from the shapes, since configurations may give
    single modules others."""
    words = stored[name].shape
    needed = ("weight_scale", "weight_shape") if layout == "packed" else ("qzeros", "scales")
    missing = [part for part in needed if part not in parts]
    grids = [stored[parts[part]].shape for part in needed if part in parts and part != "weight_shape"]
    sized = layout != "packed" or missing or len(stored[parts["weight_shape"]].says) == 2
    if missing or not sized or any(len(grid) != 2 for grid in (words, *grids)) or stored[name].dtype != "I32":
        lacks = f" without its {', '.join(missing)}" if missing else ""
        raise TargetError(f"{name} is {list(words)} in {stored[name].dtype}{lacks}, which is no {layout} weight")
    if layout == "packed":
        shape, groups = stored[parts["weight_shape"]].says, stored[parts["weight_scale"]].shape[-1]
        bits = next((bits for bits in BITS if (words[0], words[1]) == (shape[0], -(-shape[1] * bits // 32))), 0)
    elif layout == "gptq":
        outputs = stored[parts["scales"]].shape[1]
        bits = stored[parts["qzeros"]].shape[1] * 32 // outputs
        shape, groups = (outputs, words[0] * 32 // max(bits, 1)), stored[parts["scales"]].shape[0]
    else:
        bits, groups = 4, stored[parts["scales"]].shape[0]
        shape = (words[1] * 8, words[0])
    if bits not in BITS or not groups or ("g_idx" not in parts and shape[1] % groups):
        raise TargetError(
            f"{name} of {list(words)} is {list(shape)} codes in {groups} groups, which is no {layout} weight "
            f"of {' or '.join(map(str, BITS))} bits"
        )
    plus = 1 if layout == "gptq" and settings.get("checkpoint_format", "gptq") == "gptq" else 0
    return QuantisedWeight(layout=layout, shape=shape, parts=parts, bits=bits, plus=plus)


def _mxfp4(name: str, stored: Mapping[str, StoredTensor]) -> QuantisedWeight:
    blocks, scales = stored[name], name.removesuffix(_BLOCKS) + _SCALES
    beside = stored[scales].shape if scales in stored else None
    if blocks.dtype != "U8" or blocks.shape[3:] != (_MXFP4_GROUP // 2,) or beside != blocks.shape[:3]:
        raise TargetError(
            f"{name} is {list(blocks.shape)} in {blocks.dtype} with {scales} of {list(beside or ())}, which are no "
            f"blocks of {_MXFP4_GROUP} codes and their scales"
        )
    experts, outputs, groups = beside
    shape = (experts, groups * _MXFP4_GROUP, outputs)
    return QuantisedWeight(layout="mxfp4", shape=shape, parts={"blocks": name, "scales": scales})


def _scale_of(parts: Mapping[str, str]) -> str:
    return "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"


# What a layout is read as: codes [o, I], zero points [o, G] (None: zero), scales [o, G], and the group of each input
# [I], or how many inputs in a row make one.
_Codes = tuple[Tensor, Tensor | None, Tensor, Tensor | int]


def _read_scaled(weight: QuantisedWeight, read: Read, start: int, stop: int) -> _Codes:
    over_rows, over_columns = weight.block
    rows_o = torch.arange(start, stop) // over_rows

    def by_rows(part: str) -> Tensor:
        grid = read(weight.parts[part], ())
        return grid.reshape(grid.shape[0] if grid.ndim else 1, -1)[rows_o]

    codes_oI = read(weight.parts["weight"], (slice(start, stop),))
    zeros_oG = by_rows("weight_zero_point") if "weight_zero_point" in weight.parts else None
    return codes_oI, zeros_oG, by_rows(_scale_of(weight.parts)), over_columns


def _read_packed(weight: QuantisedWeight, read: Read, start: int, stop: int) -> _Codes:
    rows = (slice(start, stop),)
    codes_oI = _unpack(read(weight.parts["weight_packed"], rows), weight.bits)[:, : weight.shape[1]]
    scales_oG = read(weight.parts["weight_scale"], rows)
    zeros_oG: Tensor | None = torch.full_like(scales_oG, 1 << (weight.bits - 1))
    if "weight_zero_point" in weight.parts:
        words = read(weight.parts["weight_zero_point"], ())
        zeros_oG = _unpack(words.T, weight.bits).T[start:stop]
    return codes_oI, zeros_oG, scales_oG, _groups_of(weight, read, "weight_g_idx", scales_oG.shape[1])


def _read_gptq(weight: QuantisedWeight, read: Read, start: int, stop: int) -> _Codes:
    columns = (slice(None), slice(start, stop))
    codes_oI = _unpack(read(weight.parts["qweight"], columns).T, weight.bits)
    zeros_GO = _unpack(read(weight.parts["qzeros"], ()), weight.bits)
    zeros_oG = (zeros_GO[:, start:stop].T.int() + weight.plus) % (1 << weight.bits)
    scales_oG = read(weight.parts["scales"], columns).T
    return codes_oI, zeros_oG, scales_oG, _groups_of(weight, read, "g_idx", scales_oG.shape[1])


def _read_awq(weight: QuantisedWeight, read: Read, start: int, stop: int) -> _Codes:
    place = torch.tensor(_AWQ_ORDER).argsort()

    def columns(part: str) -> Tensor:
        words = read(weight.parts[part], (slice(None), slice(start // 8, -(-stop // 8))))
        codes = _unpack(words, 4).reshape(len(words), -1, 8)[..., place].flatten(1)
        return codes[:, start % 8 :][:, : stop - start].T

    scales_oG = read(weight.parts["scales"], (slice(None), slice(start, stop))).T
    group_I = _groups_of(weight, read, "g_idx", scales_oG.shape[1])
    return columns("qweight"), columns("qzeros"), scales_oG, group_I


def _read_mxfp4(weight: QuantisedWeight, read: Read, start: int, stop: int) -> Tensor:
    blocks_eOGb, scales_eOG = (read(weight.parts[part], (slice(start, stop),)) for part in ("blocks", "scales"))
    values_eOGi = torch.tensor(_E2M1)[torch.stack((blocks_eOGb & 15, blocks_eOGb >> 4), dim=-1).flatten(3).int()]
    scaled_eOGi = torch.ldexp(values_eOGi, scales_eOG.int()[..., None] - 127)
    return scaled_eOGi.flatten(2).transpose(1, 2)


_FORMS: dict[Layout, Callable[[QuantisedWeight, Read, int, int], _Codes]] = {
    "scaled": _read_scaled,
    "packed": _read_packed,
    "gptq": _read_gptq,
    "awq": _read_awq,
}


def _unpack(words: Tensor, bits: int) -> Tensor:
    """[n, m] int32 -> [n, m * 32 / bits] uint8, the lowest bits of a word first: its bytes lie in that order."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    in_order = words.clone(memory_format=torch.contiguous_format)  # strides of single rows and columns, too
    codes = in_order.view(torch.uint8)[..., None] >> shifts
    return codes.bitwise_and_((1 << bits) - 1).flatten(1)


def _groups_of(weight: QuantisedWeight, read: Read, part: str, groups: int) -> Tensor | int:
    inputs = weight.shape[1]
    if part in weight.parts:
        group_I = read(weight.parts[part], ()).long()
        if inputs % groups or not torch.equal(group_I, torch.arange(inputs) // (inputs // groups)):
            return group_I
    return inputs // groups
