"""Attention implementations under test: every registered device, and rungs that can be exercised without hardware."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from torchspec.core.interfaces.device import Attention
from torchspec.core.registry import devices, load_device
from torchspec.devices._math_kernel import MathKernel
from torchspec.devices._tiled_attention import TiledAttention


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An attention implementation and the device its tensors live on."""

    attention: Attention
    device: torch.device


def available_device(name: str) -> torch.device:
    """Binds the registered device `name`, or skips with its probe's reason."""
    availability = devices().spec(name).probe()
    if not availability.ok:
        pytest.skip(f"{name}: {availability.reason}")
    return load_device(name).runtime.bind(0)


@pytest.fixture(params=["cpu", "math", "cuda_emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "math":
        return Subject(attention=TiledAttention(MathKernel(), temporary_bytes=1 << 20), device=torch.device("cpu"))
    if request.param == "cuda_emulated":
        return request.getfixturevalue("cuda_emulated")
    device = available_device(request.param)
    return Subject(attention=load_device(request.param).attention, device=device)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_name(request: pytest.FixtureRequest) -> str:
    available_device(request.param)
    return request.param


@pytest.fixture
def cuda_emulated() -> Iterator[Subject]:
    """The CUDA ladder on the CPU: PyTorch's CUDA attention operators get CPU kernels, under their real schemas, that
    behave as their sources say and refuse what those refuse. Proves the calls, not the kernels."""
    from torchspec.devices.cuda.attention import AtenFlashKernel, EfficientKernel, Ladder

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _flash_forward, "CPU")
    library.impl("_flash_attention_backward", _flash_backward, "CPU")
    library.impl("_scaled_dot_product_efficient_attention", _efficient_forward, "CPU")
    library.impl("_scaled_dot_product_efficient_attention_backward", _efficient_backward, "CPU")
    ladder = Ladder([AtenFlashKernel((9, 0)), EfficientKernel(), MathKernel()])
    yield Subject(attention=TiledAttention(ladder, temporary_bytes=1 << 20), device=torch.device("cpu"))
    library._destroy()


def _softmax_parts(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """fp32 scores [B, H, Q, S] with the bias added, heads first."""
    scores = q.float() @ k.float().mT * scale + bias
    return scores, scores.logsumexp(-1)


def _gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores, _ = _softmax_parts(q, k, bias, scale)
    weights = (scores - lse[..., None]).exp()
    dout32 = dout.float()
    delta = (dout32 * out.float()).sum(-1, keepdim=True)
    dscores = weights * (dout32 @ v.float().mT - delta) * scale
    return dscores @ k.float(), dscores.mT @ q.float(), weights.mT @ dout32


def _causal_bias(rows: int, keys: int, offset: int) -> Tensor:
    return torch.full((rows, keys), -math.inf).triu(offset + 1)


def _check_flash(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert all(x.dtype in (torch.float16, torch.bfloat16) and x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[-1] % 8 == 0
    assert q.shape[-1] <= 256


def _flash_operands(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_flash(q, k, v)
    group = q.shape[2] // k.shape[2]
    rows, keys = q.shape[1], k.shape[1]
    bias = _causal_bias(rows, keys, keys - rows) if causal else torch.zeros(rows, keys)
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    return q.transpose(1, 2), k, v, bias


def _flash_forward(  # type: ignore[no-untyped-def]
    query, key, value, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug, *, scale
):
    assert cum_q is cum_k is None
    assert (max_q, max_k, dropout_p, debug) == (query.shape[1], key.shape[1], 0.0, False)
    q, k, v, bias = _flash_operands(query, key, value, is_causal)
    scores, lse = _softmax_parts(q, k, bias, scale)
    out = (scores.softmax(-1) @ v.float()).to(query.dtype).transpose(1, 2).contiguous()
    empty = query.new_empty(0)
    return out, lse.contiguous(), torch.zeros(2, dtype=torch.uint64), empty, empty


def _flash_backward(  # type: ignore[no-untyped-def]
    dout, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, rng, unused, *, scale
):
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    assert lse.dtype == torch.float32
    assert (max_q, max_k, dropout_p) == (query.shape[1], key.shape[1], 0.0)
    q, k, v, bias = _flash_operands(query, key, value, is_causal)
    dq, dk, dv = _gradients(dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, bias, scale)
    dk, dv = (x.unflatten(1, (key.shape[2], -1)).sum(2) for x in (dk, dv))
    return tuple(x.transpose(1, 2).to(query.dtype) for x in (dq, dk, dv))


def _efficient_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    assert q.shape[1] == k.shape[1] == v.shape[1], "one key head per query head"
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype != torch.float64 for x in (q, k, v))
    rows, keys = q.shape[2], k.shape[2]
    if bias is None:
        return _causal_bias(rows, keys, 0) if causal else torch.zeros(rows, keys)
    assert not causal
    assert bias.dtype == q.dtype
    assert bias.shape == (*q.shape[:3], keys)
    assert bias.stride(-1) == 1
    assert bias.stride(2) % 16 == 0
    return bias.float()


def _efficient_forward(  # type: ignore[no-untyped-def]
    query, key, value, bias, compute_lse, dropout_p=0.0, is_causal=False, *, scale
):
    assert compute_lse
    full_bias = _efficient_bias(query, key, value, bias, is_causal)
    scores, lse = _softmax_parts(query, key, full_bias, scale)
    out = (scores.softmax(-1) @ value.float()).to(query.dtype)  # NaN in rows without keys
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
    full_bias = _efficient_bias(query, key, value, bias, is_causal)
    grads = _gradients(dout, query, key, value, out, lse[..., :rows], full_bias, scale)
    return (*(x.to(query.dtype) for x in grads), None)
