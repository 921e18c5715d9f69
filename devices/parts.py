"""Parts that most adapters are put together from: a kernel for tiles, and the names of PyTorch's modules and backends.

`TiledAttention` makes an `Attention` of a `Kernel` that knows only full, causal and small masked tiles; `MathKernel` is
such a kernel in plain matrix products, for any device; `TorchRuntime` and `TorchCommunication` are a device's module of
PyTorch (`torch.<device>`) and a backend of torch.distributed behind the contract's names.
"""

from torchspec.devices._collectives import TorchCommunication
from torchspec.devices._math_kernel import MathKernel
from torchspec.devices._tiled_attention import Kernel, TiledAttention, statistics_dtype
from torchspec.devices._tiles import BLOCK_ROWS, Tile, TileKinds
from torchspec.devices._torch_runtime import TorchRuntime, torch_profile

__all__ = [
    "BLOCK_ROWS",
    "Kernel",
    "MathKernel",
    "Tile",
    "TileKinds",
    "TiledAttention",
    "TorchCommunication",
    "TorchRuntime",
    "statistics_dtype",
    "torch_profile",
]
