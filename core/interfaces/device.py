"""What a piece of hardware must provide. Adapters implement these; core is handed a `Device` and never detects one.

Shape letters: B batch, Q query rows, S key rows, Hq query heads, Hk key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from torchspec.core.interfaces.mask import MaskSpec

API_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Availability:
    """The answer of a probe: can this be used here, and if not, why and what to do."""

    ok: bool
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """Bytes. `peak` is since the last reset; `total` is 0 where the device cannot say."""

    allocated: int
    peak: int
    total: int


class Runtime(Protocol):
    """Binding, memory, random state and the names other systems know the hardware by."""

    device_type: str
    visible_devices_variable: str | None
    allocator_variable: str | None
    ray_resource: str | None

    def device_count(self) -> int: ...
    def bind(self, local_rank: int) -> torch.device:
        """Make `local_rank`'s device current; called before the process group is created."""
        ...

    def synchronize(self) -> None: ...
    def memory(self) -> MemoryStats: ...
    def reset_peak_memory(self) -> None: ...
    def manual_seed(self, seed: int) -> None:
        """Seed the host's generator and this device's."""
        ...

    def rng_state(self) -> Tensor:
        """This device's generator, uint8 on the CPU; the host's is torch.get_rng_state()."""
        ...

    def set_rng_state(self, state: Tensor) -> None: ...


class Communication(Protocol):
    """Collectives. Groups are always passed, never implied."""

    backend: str
    supports_ipc: bool

    def init(self, device: torch.device, timeout: timedelta) -> None:
        """Create the world from the launcher's environment, or a world of one without a launcher."""
        ...

    def all_to_all(self, parts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
        """Send parts[r] to group rank r, receive one tensor of the same shape from each; contiguous tensors."""
        ...

    def ring_exchange(self, tensor: Tensor, group: ProcessGroup) -> tuple[Tensor, Callable[[], None]]:
        """Start sending to the next group rank and receiving from the previous; (buffer, wait)."""
        ...


class Attention(Protocol):
    """The one primitive pair. All tensors [B, rows, heads, D]; Hq is a multiple of Hk.

    `backward` may be given a merged (global) `out` and `lse` of a softmax over more keys than these;
    it then returns this key set's exact share of the gradients.
    """

    temporary_bytes: int
    """How large a temporary of a derived form should be: what a CPU's cache holds, what an accelerator can spare."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> tuple[Tensor, Tensor]:
        """-> out [B, Q, Hq, D] in q's dtype, lse [B, Hq, Q] fp32 (fp64 for fp64); natural log, -inf if no key."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: MaskSpec,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> dq, dk, dv in the dtypes and shapes of q, k, v."""
        ...


class FusedOps:
    """Elementwise pieces of a transformer in plain torch; a device overrides those it has kernels for."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last axis, statistics in fp32 (1910.07467)."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return normed.to(x.dtype) * weight

    def rotary(self, x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
        """Rotate halves: x * cos + rotate_half(x) * sin; cos and sin broadcast over heads."""
        cos, sin = cos_BSD.unsqueeze(2).to(x_BSHD.dtype), sin_BSD.unsqueeze(2).to(x_BSHD.dtype)
        first, second = x_BSHD.chunk(2, dim=-1)
        return x_BSHD * cos + torch.cat((-second, first), dim=-1) * sin

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def wide_mm(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b of two matrices, accumulated and returned in fp32 (fp64 for fp64) whatever their precision."""
        wide = torch.promote_types(a.dtype, torch.float32)
        return a.to(wide) @ b.to(wide)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A loaded adapter."""

    name: str
    runtime: Runtime
    communication: Communication
    attention: Attention
    ops: FusedOps = field(default_factory=FusedOps)


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """Light description found through the entry-point group `torchspec.devices`.

    Importing the module that holds it must not import a vendor library; `load` may.
    `capabilities` are data checked when a configuration is, e.g. {"bf16", "fp64", "ipc"}.
    """

    name: str
    device_type: str
    probe: Callable[[], Availability]
    load: Callable[[], Device]
    capabilities: frozenset[str] = frozenset()
    api_version: int = API_VERSION
