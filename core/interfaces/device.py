"""What a piece of hardware must provide. Adapters implement these; core is handed a `Device` and never detects one.

Shape letters: B batch, Q query rows, S key rows, Hq query heads, Hk key/value heads, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from torchspec.core.interfaces.mask import MaskSpec
from torchspec.core.ops.distillation import TilePairs, TileTeacher, TileTerms, distillation_tile
from torchspec.core.ops.fp8 import Scaled
from torchspec.core.ops.maps import LinearMaps
from torchspec.core.ops.norm import rms_norm, rms_norm_backward
from torchspec.core.ops.rotary import rotary
from torchspec.core.ops.swiglu import swiglu, swiglu_backward

API_VERSION = 1

CAPABILITIES = {
    "bf16": "attention, products and collectives in bfloat16",
    "fp16": "the same in float16",
    "fp64": "the same in float64",
    "fp8": "products of FP8 matrices, in hardware or emulated (`FusedOps.fp8`)",
    "ipc": "`shared_memory` is memory of the device itself",
    "compile": "torch.compile makes kernels for it",
    "ranks_share_device": "any number of ranks may be bound to one device",
}
"""What a device may declare, and what it then promises; fp32 is never declared."""


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
        """Make `local_rank`'s device current and return it; called before the process group is created.

        Where one device is visible, any local rank gets it: the launcher has shown each rank its own. A rank for which
        there is no device is an UnavailableError. What is returned has its index, but on a CPU.
        """
        ...

    def synchronize(self) -> None: ...
    def memory(self) -> MemoryStats: ...
    def reset_peak_memory(self) -> None: ...
    def limit_memory(self, fraction: float) -> None:
        """Of the bound device's memory: what this process allocates beyond it is refused as if there were no more."""
        ...

    def manual_seed(self, seed: int) -> None:
        """Seed the host's generator and this device's."""
        ...

    def rng_state(self) -> Tensor:
        """This device's generator, uint8 on the CPU; the host's is torch.get_rng_state()."""
        ...

    def set_rng_state(self, state: Tensor) -> None: ...

    def upload(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start copying tensors of the host to the bound device, beside what it computes -> what waits for the copies.

        The host's tensors may be dropped at once, but not changed before the wait; the copies may be used by what is
        queued after it, on the stream that is current then.
        """
        ...

    def profile(self, directory: Path) -> AbstractContextManager[None]:
        """Record what the host and the bound device do inside the block; after it the trace is in `directory`."""
        ...


class Communication(Protocol):
    """Collectives. Groups are always passed, never implied."""

    backend: str

    def init(self, device: torch.device, timeout: timedelta) -> None:
        """Create the world from the launcher's environment, or a world of one without a launcher.

        `timeout` bounds the ranks' meeting here and every later collective of the world.
        """
        ...

    def all_to_all(
        self, parts: Sequence[Tensor], group: ProcessGroup, rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Send parts[r] to group rank r, receive one from each; the same on every rank in all but the first axis.

        `rows[r]` is the length of the first axis of what rank r sends here; None: all parts have one shape.
        """
        ...

    def all_gather(self, tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
        """Every group rank's tensor, in rank order; all of one shape."""
        ...

    def reduce_scatter(self, parts: Sequence[Tensor], group: ProcessGroup) -> Tensor:
        """The sum over the group's ranks of their parts[r], where r is this rank; all of one shape."""
        ...

    def all_reduce(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """The sum over the group's ranks, on each of them; `tensor` is not changed."""
        ...

    def ring_exchange(self, tensor: Tensor, group: ProcessGroup) -> tuple[Tensor, Callable[[], None]]:
        """Start sending to the next group rank and receiving from the previous; (buffer, wait)."""
        ...


class Attention(Protocol):
    """The one primitive pair. All tensors [B, rows, heads, D]; Hq is a multiple of Hk.

    `backward` may be given a merged (global) `out` and `lse` of a softmax over more keys than these;
    it then returns this key set's exact share of the gradients.
    """

    @property
    def temporary_bytes(self) -> int:
        """How large a temporary of a derived form should be: what a cache holds, or an accelerator can spare."""
        ...

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


@dataclass(frozen=True, kw_only=True)
class Fp8Support:
    """How a device multiplies FP8 matrices: in hardware, or by other products with the same result, which are slower
    than bf16 and there for tests; and why, unless in hardware."""

    kind: Literal["native", "emulated", "absent"]
    reason: str = ""


class FusedOps:
    """Elementwise pieces of a training step as pairs of functions; `core.models.fused` differentiates with them.

    In plain torch (`core.ops`); a device overrides those that it has kernels for, and these stay their oracle.
    """

    temporary_bytes: int = 2 << 20
    """How large a temporary should be: what a CPU's cache holds, what an accelerator can spare."""

    loss_bytes: int = 48 << 20
    """What the loss should hold at a time: enough rows for products at full speed."""

    maps: LinearMaps = LinearMaps()
    """The products of linear maps; a run in FP8 puts others here. No adapter's to set."""

    def with_maps(self, maps: LinearMaps) -> Self:
        """The same operators beside other `maps`."""
        made = copy.copy(self)
        made.maps = maps
        return made

    @property
    def fp8(self) -> Fp8Support:
        """What `scaled_mm` is on the bound device; the capability `fp8` promises that it is not absent."""
        return Fp8Support(kind="absent", reason="its adapter offers no products of FP8 matrices")

    def scaled_mm(self, a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
        """(va vb^T) sa sb^T [R of a, R of b] in `dtype`, bf16 or fp32, of operands [R, K] (`core.ops.fp8`).

        a is e4m3 or e5m2, b e4m3; K and b's R are multiples of 16. Summed in fp32, or as good as hardware does, and
        rounded once. A NaN of either operand makes its row or column NaN.
        """
        raise NotImplementedError(self.fp8.reason)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Root-mean-square norm over the last axis -> (y in x's dtype, what the gradient needs, one value a row)."""
        return rms_norm(x, weight, eps)

    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """-> dx, dweight. `kept` is `rms_norm`'s."""
        return rms_norm_backward(dy, x, weight, kept)

    def rotary(self, x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
        """Rotate halves: x * cos + rotate_half(x) * sin; cos and sin broadcast over heads. -sin is the gradient."""
        return rotary(x_BSHD, cos_BSD, sin_BSD)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up, self.temporary_bytes)

    def swiglu_backward(self, dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> swiglu(gate, up) once more, dgate, dup. `dout` may be overwritten."""
        return swiglu_backward(dout, gate, up, self.temporary_bytes)

    def wide_operand(self, x: Tensor) -> Tensor:
        """x as `wide_mm` reads it best when it reads it many times."""
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def wide_mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b of two matrices, accumulated and returned in fp32 (fp64 for fp64) whatever their precision."""
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return torch.mm(a.to(wide), b.to(wide), out=out)

    def distillation_tile(
        self, logits_CN: Tensor, teacher: TileTeacher, pairs: TilePairs, *, with_grad: bool
    ) -> TileTerms:
        """The terms of some pairs; their gradient replaces the logits (`core.ops.distillation`)."""
        return distillation_tile(logits_CN, teacher, pairs, with_grad=with_grad, temporary_bytes=self.temporary_bytes)


class SharedMemory(Protocol):
    """Memory of this device that other processes of the machine can open. All tensors uint8 [nbytes].

    Who has a buffer open is the caller's to know: a reader lets go of its tensor before the exporter releases it, and
    the exporter outlives its readers' use.
    """

    device_type: str
    reads_in_place: bool
    """Whether readers may keep what they opened; if not, they copy it, synchronise and let go."""

    def allocate(self, nbytes: int, directory: Path) -> tuple[Tensor, str]:
        """-> memory and its handle, printable text; MemoryError when there is no room.

        `directory` is private to the user and lies in memory; a device whose memory is shared as files puts them there.
        """
        ...

    def open(self, handle: str) -> Tensor:
        """The same memory, in another process or this one; OSError, ValueError or RuntimeError if it is not there."""
        ...

    def release(self, handle: str) -> None:
        """Give up what this process allocated. Its tensor must not be used any more, here or elsewhere."""
        ...

    def synchronize(self) -> None:
        """Wait until what this thread queued on the current stream is done."""
        ...


class Multiplexer(Protocol):
    """A service through which several processes compute on one device at the same time, instead of by turns."""

    def available(self) -> Availability: ...

    def start(self, directory: Path) -> Callable[[], None]:
        """Start one of its own in this empty directory -> what stops it. It does not outlive this process, however that
        ends. UnavailableError with the reason when it does not start."""
        ...

    def environment(self, directory: Path) -> Mapping[str, str]:
        """Variables of the processes that are to use it, from their beginning."""
        ...


@dataclass(frozen=True, kw_only=True)
class Device:
    """A loaded adapter. `shared_memory` and `multiplexer` are None where a device has none."""

    name: str
    runtime: Runtime
    communication: Communication
    attention: Attention
    ops: FusedOps = field(default_factory=FusedOps)
    shared_memory: SharedMemory | None = None
    multiplexer: Multiplexer | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """Light description found through the entry-point group `torchspec.devices`.

    Importing the module that holds it must not import a vendor library; `load` may.
    `capabilities` are some of CAPABILITIES, checked when a configuration is.
    """

    name: str
    device_type: str
    probe: Callable[[], Availability]
    load: Callable[[], Device]
    capabilities: frozenset[str] = frozenset()
    api_version: int = API_VERSION
