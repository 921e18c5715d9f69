"""Every call of torch_npu that torchspec makes, by keyword: the one module to look at when torch_npu changes.

Operators are called as `torch.ops.npu`, which is there once torch_npu has been imported (`start`). Their schemas and
the Python functions used here are recorded of the published wheels (ci/record_torch_npu.py), and tests/devices/ascend
holds every call against each. Results are taken by their place, never unpacked: versions have differed in how many
there are. Facts that the calls rest on (the operators' own documentation):

- `atten_mask` is True where a pair is *hidden*. Without one, `sparse_mode` means nothing: every row sees every key.
- `scale` is 1 where none is given.
- Modes 2, 3 and 4 read their triangle from one compressed mask of 2048 x 2048, whatever the lengths.
- `softmax_max` and `softmax_sum` hold each row's value eight times, in fp32. Of packed documents they come heads first
  within each document, though they are labelled otherwise; `softmax_layout="TND"` is what the label says.
- `actual_seq_*` are the documents' ends, without a leading 0.

Shape letters: B batch, Q query rows, S key rows, T rows of all documents, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.devices.api import UnavailableError

COMPRESSED = 2048
COPIES = 8
FULL_MASK, CAUSAL_LOWER_RIGHT, BAND = 1, 3, 4
"""Sparse modes: a whole mask is given; causal from the lower right corner; a band from there."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Which pairs are computed; with the defaults, all of them.

    hidden   True where a pair is not: [B or 1, 1, Q, S] for FULL_MASK, the compressed triangle for the others
    mode     one of the sparse modes above
    before   only for BAND: keys that a row sees before the one that is level with it
    rows_without_keys    only for FULL_MASK: there may be some
    row_ends, key_ends   of documents; q, k and v are then [T, heads, D]
    """

    hidden: Tensor | None = None
    mode: int = 0
    before: int = 0
    rows_without_keys: bool = False
    row_ends: Sequence[int] | None = None
    key_ends: Sequence[int] | None = None


def start() -> None:
    """Import torch_npu, which adds the device to torch. UnavailableError with the cause where that fails."""
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(
            f"device 'npu' cannot be loaded: importing torch_npu failed: {error}\n    remedy: source CANN's set_env.sh "
            f"before Python starts, and have the torch that this torch_npu was built for, without CUDA (docs/ascend.md)"
        ) from error


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, sparsity: Sparsity) -> tuple[Tensor, Tensor, Tensor]:
    """-> out like q; each row's largest score and its sum of exponentials, fp32 [B, H, Q] or [T, H]."""
    results = torch.ops.npu.npu_fusion_attention(
        query=q.contiguous(),
        key=k.contiguous(),
        value=v.contiguous(),
        head_num=q.shape[-2],
        scale=scale,
        **_options(sparsity),
    )
    return results[0], results[1][..., 0], results[2][..., 0]


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, sparsity: Sparsity
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv. `lse` fp32 [B, H, Q] or [T, H].

    The operator divides exp(score - softmax_max) by softmax_sum: with lse and 1 that is exp(score - lse), so an lse of
    more keys than these does as well.
    """
    maximum = lse[..., None].expand(*lse.shape, COPIES).contiguous()
    results = torch.ops.npu.npu_fusion_attention_grad(
        query=q.contiguous(),
        key=k.contiguous(),
        value=v.contiguous(),
        dy=dout.contiguous(),
        head_num=q.shape[-2],
        softmax_max=maximum,
        softmax_sum=torch.ones_like(maximum),
        attention_in=out.contiguous(),
        scale_value=scale,
        **_options(sparsity),
    )
    return results[0], results[1], results[2]


def _options(sparsity: Sparsity) -> dict[str, Any]:
    options: dict[str, Any] = {
        "input_layout": "BSND",
        "atten_mask": sparsity.hidden,
        "sparse_mode": sparsity.mode,
        "inner_precise": 2 if sparsity.rows_without_keys else 0,
    }
    if sparsity.mode == BAND:
        options |= {"pre_tockens": sparsity.before, "next_tockens": 0}
    if sparsity.row_ends is not None and sparsity.key_ends is not None:
        ends = {"actual_seq_qlen": list(sparsity.row_ends), "actual_seq_kvlen": list(sparsity.key_ends)}
        options |= {"input_layout": "TND", "softmax_layout": "TND", **ends}
    return options


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (y like x, 1 / root mean square, fp32 [..., 1]). Both tensors of one dtype."""
    results = torch.ops.npu.npu_rms_norm(self=x.contiguous(), gamma=weight.contiguous(), epsilon=eps)
    return results[0], results[1]


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx like x, dweight in fp32."""
    results = torch.ops.npu.npu_rms_norm_backward(
        dy=dy.contiguous(), self=x.contiguous(), gamma=weight.contiguous(), rstd=inverse.contiguous()
    )
    return results[0], results[1]


def rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotate halves; all three of one dtype."""
    turned: Tensor = torch.ops.npu.npu_rotary_mul(
        self=x_BSHD.contiguous(),
        r1=cos_BSD.unsqueeze(2).contiguous(),
        r2=sin_BSD.unsqueeze(2).contiguous(),
        rotary_mode="half",
    )
    return turned


def swiglu(gate_up: Tensor) -> Tensor:
    """silu of the last axis' first half, times the second half."""
    out: Tensor = torch.ops.npu.npu_swiglu(self=gate_up, dim=-1)
    return out


def swiglu_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of both halves."""
    grad: Tensor = torch.ops.npu.npu_swiglu_backward(grad_output=dout.contiguous(), self=gate_up, dim=-1)
    return grad


@contextmanager
def profile(directory: Path) -> Iterator[None]:
    """The vendor's profiler, which alone sees what the NPU does; a folder of its own naming, for TensorBoard."""
    profiler = importlib.import_module("torch_npu").profiler
    with profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
        on_trace_ready=profiler.tensorboard_trace_handler(dir_name=str(directory)),
        record_shapes=True,
    ):
        yield
