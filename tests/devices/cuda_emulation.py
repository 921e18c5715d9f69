"""NVIDIA's attention kernels on the CPU, slow and strict: they compute what their sources say, and refuse what those
refuse. They prove the calls, not the kernels.

PyTorch's operators get CPU kernels under their real schemas (`installed`). The flash-attn packages are stood in for by
operators with the published signatures (`FA2`, `FA3`), made with torch.library as the packages make theirs:

FA2   Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py of 2.7 and 2.8
FA3   Dao-AILab/flash-attention, hopper/flash_attn_interface.py, 01afd16d248c4c7d0f9aed1914084f16c490eaed
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor

from torchspec.devices.cuda.attention import Ladder
from torchspec.devices.cuda.attention.cudnn import CudnnKernel
from torchspec.devices.cuda.attention.efficient import EfficientKernel
from torchspec.devices.cuda.attention.fa2 import FlashAttn2Kernel
from torchspec.devices.cuda.attention.fa3 import FlashAttn3Kernel
from torchspec.devices.cuda.attention.flash import AtenFlashKernel
from torchspec.devices.parts import MathKernel

HOPPER = (9, 0)

CUDNN = SimpleNamespace(lse_axes=4)
"""[B, H, Q, 1] in the versions of PyTorch that were looked at; newer sources have [B, H, Q]."""


@contextmanager
def installed() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _aten_flash_forward, "CPU")
    library.impl("_flash_attention_backward", _aten_flash_backward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention", _cudnn_forward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", _cudnn_backward, "CPU")
    library.impl("_scaled_dot_product_efficient_attention", _efficient_forward, "CPU")
    library.impl("_scaled_dot_product_efficient_attention_backward", _efficient_backward, "CPU")
    yield
    library._destroy()


def ladder(first: str) -> Ladder:
    """The rung of this name, and those that take what it does not."""
    rungs = {
        "fa3": lambda: FlashAttn3Kernel(FA3),
        "fa2": lambda: FlashAttn2Kernel(HOPPER, FA2),
        "flash": lambda: AtenFlashKernel(HOPPER),
        "cudnn": lambda: CudnnKernel(HOPPER),
    }
    return Ladder([rungs[first](), EfficientKernel(HOPPER), MathKernel()])


# Attention of [B, H, rows, D] in fp32 under an additive bias.


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> out (NaN in rows without keys), lse [B, H, Q]."""
    scores = q.float() @ k.float().mT * scale + bias
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q32, k32, v32, dout32 = (x.float() for x in (q, k, v, dout))
    weights = (q32 @ k32.mT * scale + bias - lse[..., None]).exp()
    delta = (dout32 * out.float()).sum(-1, keepdim=True)
    dscores = weights * (dout32 @ v32.mT - delta) * scale
    return dscores @ k32, dscores.mT @ q32, weights.mT @ dout32


def _causal_bias(rows: int, keys: int, offset: int) -> Tensor:
    return torch.full((rows, keys), -math.inf).triu(offset + 1)


# Flash kernels: [B, rows, H, D], or [T, H, D] with cumulative lengths; aligned lower right.


def _flash_bias(rows: int, keys: int, causal: bool, left: int, right: int) -> Tensor:
    own = torch.arange(rows)[:, None] + keys - rows
    key = torch.arange(keys)
    right = 0 if causal else right
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    if left >= 0:
        hidden |= key < own - left
    if right >= 0:
        hidden |= key > own + right
    return torch.zeros(rows, keys).masked_fill(hidden, -math.inf)


def _check_flash(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert all(x.dtype == q.dtype and x.stride(-1) == 1 for x in (q, k, v))
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] % 8 == 0
    assert q.shape[-1] <= 256
    assert k.shape == v.shape


def _spans(cuts: Tensor, longest: int, total: int) -> list[slice]:
    assert (cuts.dtype, cuts.ndim, cuts.is_contiguous()) == (torch.int32, 1, True)
    ends = cuts.tolist()
    assert (ends[0], ends[-1]) == (0, total)
    assert longest == max(b - a for a, b in pairwise(ends))
    return [slice(a, b) for a, b in pairwise(ends)]


def _sequences(q: Tensor, k: Tensor, cuts_q: Tensor | None, cuts_k: Tensor | None, max_q, max_k):
    """(rows, keys) of each packed document."""
    assert q.ndim == k.ndim == 3
    return list(zip(_spans(cuts_q, max_q, len(q)), _spans(cuts_k, max_k, len(k)), strict=True))


def _heads_first(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2)


def flash_forward(q, k, v, cuts_q, cuts_k, max_q, max_k, causal, left, right, scale) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    _check_flash(q, k, v)
    if cuts_q is not None:
        parts = [
            flash_forward(q[rows][None], k[keys][None], v[keys][None], *[None] * 4, causal, left, right, scale)
            for rows, keys in _sequences(q, k, cuts_q, cuts_k, max_q, max_k)
        ]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)
    heads = q.shape[2]
    bias = _flash_bias(q.shape[1], k.shape[1], causal, left, right)
    out, lse = _forward(q.transpose(1, 2), _heads_first(k, heads), _heads_first(v, heads), bias, scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def flash_backward(  # type: ignore[no-untyped-def]
    dout, q, k, v, out, lse, cuts_q, cuts_k, max_q, max_k, causal, left, right, scale
) -> tuple[Tensor, Tensor, Tensor]:
    _check_flash(q, k, v)
    assert dout.shape == out.shape == q.shape
    assert dout.stride(-1) == out.stride(-1) == 1
    assert (lse.dtype, lse.is_contiguous()) == (torch.float32, True)
    if cuts_q is not None:
        assert lse.shape == (q.shape[1], q.shape[0])
        grads = [
            flash_backward(
                *(x[rows][None] for x in (dout, q)),
                *(x[keys][None] for x in (k, v)),
                out[rows][None],
                lse[:, rows][None].contiguous(),
                *[None] * 4,
                causal,
                left,
                right,
                scale,
            )
            for rows, keys in _sequences(q, k, cuts_q, cuts_k, max_q, max_k)
        ]
        return tuple(torch.cat([grad[i][0] for grad in grads]) for i in range(3))  # type: ignore[return-value]
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    heads = q.shape[2]
    bias = _flash_bias(q.shape[1], k.shape[1], causal, left, right)
    operands = (dout.transpose(1, 2), q.transpose(1, 2), _heads_first(k, heads), _heads_first(v, heads))
    dq, dk, dv = _backward(*operands, out.transpose(1, 2), lse, bias, scale)
    dk, dv = (x.unflatten(1, (k.shape[2], -1)).sum(2) for x in (dk, dv))
    return tuple(x.transpose(1, 2).to(q.dtype).contiguous() for x in (dq, dk, dv))  # type: ignore[return-value]


def _aten_flash_forward(  # type: ignore[no-untyped-def]
    query, key, value, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug, *, scale, window_size_left,
    window_size_right
):  # fmt: skip
    assert (dropout_p, debug) == (0.0, False)
    if cum_q is None:
        assert (max_q, max_k) == (query.shape[1], key.shape[1])
    sides = (window_size_left, window_size_right)
    out, lse = flash_forward(query, key, value, cum_q, cum_k, max_q, max_k, is_causal, *sides, scale)
    empty = query.new_empty(0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), empty, empty


def _aten_flash_backward(  # type: ignore[no-untyped-def]
    dout, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, rng, unused, *, scale,
    window_size_left, window_size_right
):  # fmt: skip
    assert dropout_p == 0.0
    if cum_q is None:
        assert (max_q, max_k) == (query.shape[1], key.shape[1])
    cuts, sides = (cum_q, cum_k, max_q, max_k), (window_size_left, window_size_right)
    return flash_backward(dout, query, key, value, out, lse, *cuts, is_causal, *sides, scale)


def _write(grads: tuple[Tensor, ...], dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> None:
    for grad, into in zip(grads, (dq, dk, dv), strict=True):
        assert into is not None
        assert (into.shape, into.dtype, into.is_contiguous()) == (grad.shape, grad.dtype, True)
        into.copy_(grad)


# The flash-attn package.


@torch.library.custom_op("torchspec_fa2::_flash_attn_forward", mutates_args=())
def _fa2_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
    sides = (window_size_left, window_size_right)
    out, lse = flash_forward(q, k, v, None, None, None, None, causal, *sides, softmax_scale)
    return out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


@torch.library.custom_op("torchspec_fa2::_flash_attn_varlen_forward", mutates_args=())
def _fa2_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes, return_softmax, block_table) == (0.0, 0.0, None, False, None)
    cuts, sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    out, lse = flash_forward(q, k, v, *cuts, causal, *sides, softmax_scale)
    return out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


@torch.library.custom_op("torchspec_fa2::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
    FA2.deterministic.append(deterministic)
    cuts, sides = (None, None, None, None), (window_size_left, window_size_right)
    _write(flash_backward(dout, q, k, v, out, softmax_lse, *cuts, causal, *sides, softmax_scale), dq, dk, dv)
    return softmax_lse.clone()


@torch.library.custom_op("torchspec_fa2::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _fa2_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
    FA2.deterministic.append(deterministic)
    cuts, sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    _write(flash_backward(dout, q, k, v, out, softmax_lse, *cuts, causal, *sides, softmax_scale), dq, dk, dv)
    return softmax_lse.clone()


FA2 = SimpleNamespace(
    _flash_attn_forward=_fa2_forward,
    _flash_attn_varlen_forward=_fa2_varlen_forward,
    _flash_attn_backward=_fa2_backward,
    _flash_attn_varlen_backward=_fa2_varlen_backward,
    deterministic=[],  # what its backwards were told
)


# The flash-attn-3 package.


@torch.library.custom_op("torchspec_fa3::_flash_attn_forward", mutates_args=())
def _fa3_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
    qv: Tensor | None = None, out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, page_table: Tensor | None = None, kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0,
    rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None, num_splits: int = 1,
    pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    cuts, sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    out, lse = flash_forward(q, k, v, *cuts, causal, *sides, softmax_scale)
    return out, lse, torch.empty(0), torch.empty(0)


@torch.library.custom_op("torchspec_fa3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _fa3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    cuts, sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    _write(flash_backward(dout, q, k, v, out, softmax_lse, *cuts, is_causal, *sides, softmax_scale), dq, dk, dv)
    return softmax_lse.clone()


FA3 = SimpleNamespace(_flash_attn_forward=_fa3_forward, _flash_attn_backward=_fa3_backward)


# cuDNN and the memory-efficient kernel: [B, H, rows, D], aligned upper left.


def _square_bias(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    assert q.shape[1] == k.shape[1] == v.shape[1], "one key head per query head"
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype != torch.float64 for x in (q, k, v))
    rows, keys = q.shape[2], k.shape[2]
    return _causal_bias(rows, keys, 0) if causal else torch.zeros(rows, keys)


def _check_cudnn(q: Tensor, k: Tensor) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] % 8 == 0
    assert q.shape[-1] <= 128
    assert k.shape[2] > 1
    assert not torch.are_deterministic_algorithms_enabled()


def _cudnn_forward(  # type: ignore[no-untyped-def]
    query, key, value, bias, compute_lse, dropout_p=0.0, is_causal=False, debug=False, *, scale
):
    assert (bias, compute_lse, dropout_p, debug) == (None, True, 0.0, False)
    _check_cudnn(query, key)
    out, lse = _forward(query, key, value, _square_bias(query, key, value, is_causal), scale)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    philox = torch.zeros((), dtype=torch.int64)
    empty = torch.empty(0)
    lse = lse[..., None] if CUDNN.lse_axes == 4 else lse
    return out, lse.contiguous(), empty, empty, query.shape[2], key.shape[2], philox, philox, empty


def _cudnn_backward(  # type: ignore[no-untyped-def]
    dout, query, key, value, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, *, scale
):
    assert bias is cum_q is cum_k is None
    assert (max_q, max_k, dropout_p) == (query.shape[2], key.shape[2], 0.0)
    _check_cudnn(query, key)
    assert lse.ndim == CUDNN.lse_axes
    assert lse.is_contiguous()
    assert lse.shape[:3] == query.shape[:3]
    lse = lse.view(query.shape[:3])
    grads = _backward(dout, query, key, value, out, lse, _square_bias(query, key, value, is_causal), scale)
    return tuple(x.to(query.dtype) for x in grads)


def _efficient_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    full = _square_bias(q, k, v, causal)
    if bias is None:
        return full
    assert not causal
    assert bias.dtype == q.dtype
    assert bias.shape == (*q.shape[:3], k.shape[2])
    assert bias.stride(-1) == 1
    assert bias.stride(2) % 16 == 0
    return bias.float()


def _efficient_forward(  # type: ignore[no-untyped-def]
    query, key, value, bias, compute_lse, dropout_p=0.0, is_causal=False, *, scale
):
    assert compute_lse
    out, lse = _forward(query, key, value, _efficient_bias(query, key, value, bias, is_causal), scale)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    padding = -query.shape[2] % 32
    philox = torch.zeros((), dtype=torch.int64)
    return out, torch.nn.functional.pad(lse, (0, padding), value=math.inf), philox, philox


def _efficient_backward(  # type: ignore[no-untyped-def]
    dout, query, key, value, bias, out, lse, seed, offset, dropout_p, grad_input_mask, is_causal=False, *, scale
):
    rows = query.shape[2]
    assert lse.shape[-1] % 32 == 0
    assert bool((lse[..., rows:] == math.inf).all())
    assert lse.is_contiguous()
    assert dout.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).is_contiguous()
    assert grad_input_mask == [True, True, True, False]
    full = _efficient_bias(query, key, value, bias, is_causal)
    grads = _backward(dout, query, key, value, out, lse[..., :rows], full, scale)
    return (*(x.to(query.dtype) for x in grads), None)
