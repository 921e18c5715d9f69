"""Attention on NVIDIA GPUs: one kernel a file, and the ladder that chooses among them.

Facts these calls rest on, from the sources of PyTorch and flash-attn and each held by a test: flash kernels and Tile
align causal masks lower right, efficient and cuDNN upper left; a window is counted in keys to the left of the last one
that causal shows; packed calls take int32 cumulative lengths that begin with 0, and their lse is [H, T]; efficient pads
lse to 32 rows with +inf, cuDNN gives it an axis more; all of them want it contiguous.
"""

from torchspec.devices.cuda.attention.ladder import Ladder, ladder

__all__ = ["Ladder", "ladder"]
