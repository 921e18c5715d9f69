"""Decoding a batch step by step with a cache that can take tokens back.

Tokens sit in cache columns. A row that is shorter than the others, or had tokens rejected where another row had not,
has unused columns: they are masked, keep no position, and are squeezed out when they are too many.

Shape letters: B sequences, n new tokens, S cache columns, N taps, H target hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from torchspec.backends.api import Images, Prefill, StepOutput, TargetError
from torchspec.backends.hf.cache import GrowingLayer, cache_name, compaction, new_cache
from torchspec.backends.hf.capture import image_inputs, pad_right
from torchspec.backends.hf.taps import TapRecorder
from torchspec.backends.hf.target import HfTarget
from torchspec.core.errors import DataError
from torchspec.core.models.images import ImageError

_SPARE_COLUMNS = 32
_SPARE_FRACTION = 0.25
"""Unused columns beyond both the number and the fraction of the longest sequence are squeezed out: each costs
attention work in every step, squeezing costs one copy of the cache."""


class HfDecodeSession:
    """Implements `interfaces.engine.DecodeSession`; the tensors it returns are ordinary, detached ones."""

    def __init__(
        self,
        target: HfTarget,
        prompts: Sequence[Sequence[int]],
        taps: Sequence[int],
        *,
        images: Sequence[Images] = (),
        recording: bool = True,
    ) -> None:
        """`recording=False` is for plain generation: `rollback` is then refused. A prompt with images comes alone.

        Raises TargetError when this architecture cannot be decoded so (see `rollback_of`), or takes no images, and
        DataError for images that are not those that were tokenised.
        """
        target.check_taps(taps)
        if not prompts:
            raise ValueError("a decode session needs at least one prompt")
        for row, prompt in enumerate(prompts):
            target.check_tokens(f"prompt {row}", prompt)
        with_images = any(images)
        if with_images and len(prompts) > 1:
            raise ValueError(f"a prompt with images is decoded alone, not with {len(prompts) - 1} others")
        _check_supported(target, len(prompts), recording)
        self._target = target
        self._recording = recording
        self._recorder = TapRecorder(target, taps)
        self._cache_name = cache_name(target.model)
        self._lengths = [len(prompt) for prompt in prompts]
        self._columns = max(self._lengths)
        self._trailing = [self._columns - length for length in self._lengths]
        self._revocable = [0] * len(prompts)
        self._keep_BS: Tensor | None = None  # None: every column of every row is used
        try:
            shown = image_inputs(target, "the prompt", prompts[0], images[0]) if with_images else {}
        except ImageError as error:
            raise DataError(f"a prompt cannot be answered: {error}") from error
        self.prefill = self._prefill(prompts, shown)
        # An image may take fewer positions than it has tokens: what follows it comes so much earlier.
        moved: Any = target.base.rope_deltas if with_images and _counts_images(target) else torch.zeros(1)
        self._shift_11 = moved.view(1, 1).to(target.device, torch.int64)

    def _prefill(self, prompts: Sequence[Sequence[int]], images: Mapping[str, Tensor]) -> Prefill:
        """Right padding under a causal mask needs no mask; the head sees only each prompt's last token."""
        ids_BT = pad_right(prompts).to(self._target.device)
        last_B = torch.tensor(self._lengths, device=self._target.device) - 1
        cache = new_cache(self._target.model.config, self._target.rollback, recording=self._recording)

        def only_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden_BTH = args[0]
            return (hidden_BTH[torch.arange(len(prompts), device=hidden_BTH.device), last_B][:, None], *args[1:])

        head = self._target.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        hook = head.register_forward_pre_hook(only_last)
        try:
            with self._recorder, torch.inference_mode():
                output = self._target.model(input_ids=ids_BT, use_cache=True, **{self._cache_name: cache}, **images)
        finally:
            hook.remove()
        if output.logits.shape[1] != 1:
            raise TargetError(f"{type(self._target.model).__name__} bypasses its own output head: it cannot be decoded")
        filled = output.get(self._cache_name)
        if filled is None:
            raise TargetError(
                f"{type(self._target.model).__name__} hands back no {self._cache_name}: it cannot be decoded"
            )
        self._cache: Cache = filled
        taps = [self._recorder.of_row(row, length) for row, length in enumerate(self._lengths)]
        self._recorder.outputs.clear()
        return Prefill(logits_BV=output.logits[:, 0].clone(), taps=taps)

    def step(self, tokens_Bn: Tensor) -> StepOutput:
        """Append n >= 1 tokens to every sequence, run the target over them, return their logits and taps."""
        rows = len(self._lengths)
        if tokens_Bn.ndim != 2 or tokens_Bn.shape[0] != rows or tokens_Bn.shape[1] == 0:
            raise ValueError(f"a step takes tokens of shape [{rows}, n >= 1], got {list(tokens_Bn.shape)}")
        new = tokens_Bn.shape[1]
        with torch.inference_mode():
            self._settle()
            with self._recorder:
                output = self._target.model(
                    input_ids=tokens_Bn.to(self._target.device),
                    use_cache=True,
                    **{self._cache_name: self._cache},
                    **self._where(new),
                )
        self._columns += new
        self._lengths = [length + new for length in self._lengths]
        self._revocable = [new] * rows
        taps_BnNH = self._recorder.of_batch(tokens_Bn.shape)
        self._recorder.outputs.clear()
        return StepOutput(logits_BnV=output.logits.clone(), taps_BnNH=taps_BnNH)

    def _where(self, new: int) -> dict[str, Any]:
        """Mask and positions of the next `new` columns; a cache without unused columns needs neither, unless the model
        would take positions from the images that it saw last."""
        if self._keep_BS is None and not _counts_images(self._target):
            return {}
        start_B = torch.tensor(self._lengths, device=self._target.device)
        where = {"position_ids": start_B[:, None] + torch.arange(new, device=self._target.device) + self._shift_11}
        if self._keep_BS is not None:
            self._keep_BS = torch.cat((self._keep_BS, self._keep_BS.new_ones(len(self._lengths), new)), dim=1)
            where["attention_mask"] = self._keep_BS
        return where

    def rollback(self, count_B: Tensor) -> None:
        """Forget the last count[b] tokens of sequence b, at most those of the last step."""
        counts = [int(count) for count in count_B.tolist()]
        if not self._recording:
            raise ValueError("this session was opened for generation only and records nothing to roll back to")
        if len(counts) != len(self._lengths) or not all(
            0 <= count <= revocable for count, revocable in zip(counts, self._revocable, strict=True)
        ):
            raise ValueError(f"cannot forget {counts} tokens: the last step left {self._revocable} to forget")
        for row, count in enumerate(counts):
            self._lengths[row] -= count
            self._revocable[row] -= count
            self._trailing[row] += count

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every sequence but these, which take this order."""
        kept = list(rows)
        if not kept or len(set(kept)) != len(kept) or not all(0 <= row < len(self._lengths) for row in kept):
            raise ValueError(f"cannot keep rows {kept} of {len(self._lengths)}: give one or more distinct ones")
        if kept == list(range(len(self._lengths))):
            return
        index = torch.tensor(kept, device=self._target.device)
        with torch.inference_mode():
            for layer in self._grown():
                layer.select(index)
            if self._keep_BS is not None:
                self._keep_BS = self._keep_BS[index]
            self._lengths = [self._lengths[row] for row in kept]
            self._trailing = [self._trailing[row] for row in kept]
            self._revocable = [self._revocable[row] for row in kept]

    def _settle(self) -> None:
        """Before new columns are written: drop the trailing ones no row uses, mask the others, close gaps."""
        unused = min(self._trailing)
        # A window that records must be told even of nothing to forget, to let go of what it recorded.
        if unused or (self._recording and self._target.rollback == "window"):
            self._cache.crop(-unused)
            self._columns -= unused
            self._trailing = [trailing - unused for trailing in self._trailing]
            if self._keep_BS is not None:
                self._keep_BS = self._keep_BS[:, : self._columns]
        if any(self._trailing):
            end_B = self._columns - torch.tensor(self._trailing, device=self._target.device)
            used_BS = torch.arange(self._columns, device=self._target.device) < end_B[:, None]
            self._keep_BS = used_BS if self._keep_BS is None else self._keep_BS & used_BS
            self._trailing = [0] * len(self._trailing)
        self._squeeze()

    def _squeeze(self) -> None:
        if self._keep_BS is None:
            return
        longest = max(self._lengths)
        spare, equal = self._columns - longest, min(self._lengths) == longest
        if equal and spare == 0:
            self._keep_BS = None
            return
        tolerated = max(_SPARE_COLUMNS, _SPARE_FRACTION * longest) if len(self._lengths) > 1 else 0
        if spare <= tolerated:
            return
        column_BL = compaction(self._keep_BS, longest)
        for layer in self._grown():
            layer.gather(column_BL)
        self._columns = longest
        self._keep_BS = None if equal else self._keep_BS.gather(1, column_BL)

    def _grown(self) -> list[GrowingLayer]:
        return [layer for layer in self._cache.layers if isinstance(layer, GrowingLayer)]


def _counts_images(target: HfTarget) -> bool:
    """Whether positions behind an image depend on the image (multimodal rotary positions)."""
    return hasattr(target.base, "rope_deltas")


def _check_supported(target: HfTarget, rows: int, recording: bool) -> None:
    if target.rollback == "none" and recording:
        raise TargetError(
            f"{target.spec.path} ({target.spec.model_type}) has layers with a recurrent or compressed state, which "
            "cannot take rejected tokens back: the hf engine captures and generates with it, but cannot run "
            "speculative decoding"
        )
    if target.rollback != "full" and rows > 1:
        raise TargetError(
            f"{target.spec.path} ({target.spec.model_type}) has layers that do not attend to the whole sequence, so "
            f"prompts of different lengths cannot share a cache here: decode with batch size 1, not {rows}"
        )
