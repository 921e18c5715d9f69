"""What SGLang loads into each of its processes, by the entry point `sglang.srt.plugins`. SGLang only logs what fails
here, so the runner proves from outside that it worked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchspec.backends.sglang.worker.capture import CaptureError, Collector
from torchspec.backends.sglang.worker.orders import Orders, orders, record_of
from torchspec.backends.sglang.worker.versions import APPEND, FINISH, FROM_LOGITS, FROM_PROBS, ROUND, SAMPLING

ACCEPTED = "torchspec_accepted"
"""In the answer's meta_info: an entry per token, the number of accepted drafts where a round begins, else None."""


def register() -> None:
    """Called by SGLang. Does nothing in an SGLang that no runner started."""
    given = orders()
    if given is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(FINISH, stop_where_asked, HookType.AROUND)
    HookRegistry.register(ROUND, note_round, HookType.AROUND)
    HookRegistry.register(SAMPLING, seed_each, HookType.AROUND)
    HookRegistry.register(FROM_PROBS, draw_alike, HookType.AROUND)
    HookRegistry.register(FROM_LOGITS, draw_alike_from_logits, HookType.AROUND)
    if given.store is not None:
        HookRegistry.register(APPEND, CaptureHook(given), HookType.AROUND)
    if given.cpu_chains:
        from torchspec.backends.sglang.worker.cpu_chains import register_chains

        register_chains()


class CaptureHook:
    """Around the function that would turn a prefill's hidden states into lists of floats for the answer."""

    def __init__(self, given: Orders) -> None:
        self.orders = given
        self._collector: Collector | None = None

    @property
    def collector(self) -> Collector:
        """Made when the first request comes: ranks are not known before."""
        if self._collector is None:
            from sglang.srt.runtime_context import get_parallel

            from torchspec.core.features.shared import SharedMemoryStore

            assert self.orders.store is not None
            writes = get_parallel().attn_tp_rank == 0  # every rank has all rows
            store = (
                SharedMemoryStore(root=Path(self.orders.store), capacity=self.orders.store_bytes) if writes else None
            )
            self._collector = Collector(store, self.orders.taps)
        return self._collector

    def __call__(
        self,
        original: Any,
        processor: Any,
        *,
        req: Any,
        logits_output: Any,
        hidden_state_offset: int,
        capture_hidden_mode: Any,
        extend_input_len: int,
        store: bool = True,
    ) -> int:
        """`store`: the prefill is complete and its request alive. Returns where the next request's rows begin."""
        record_id = record_of(req.rid)
        if record_id is None:
            return int(
                original(
                    processor,
                    req=req,
                    logits_output=logits_output,
                    hidden_state_offset=hidden_state_offset,
                    capture_hidden_mode=capture_hidden_mode,
                    extend_input_len=extend_input_len,
                    store=store,
                )
            )
        stop = hidden_state_offset + (extend_input_len if capture_hidden_mode.is_full() else 1)
        going_on = req.inflight_middle_chunks > 0 and not req.is_retracted and not req.finished()
        try:
            if store or going_on:
                self.collector.add(req, logits_output, hidden_state_offset, stop, whole=store)
                if store:
                    self.collector.finish(req, record_id)
                    req.hidden_states.append([float(len(req.origin_input_ids))])
            else:
                self.collector.drop(req)
        except Exception as error:  # noqa: BLE001 - it would end the scheduler, and everybody's requests with it
            _give_up(req, str(error) if isinstance(error, CaptureError) else f"{type(error).__name__}: {error}")
        return stop


def _give_up(req: Any, reason: str) -> None:
    """The request ends with this reason, which SGLang hands to whoever waits for it."""
    from http import HTTPStatus

    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    req.to_finish = FINISH_ABORT(reason, HTTPStatus.BAD_REQUEST, "CaptureError")


def stop_where_asked(original: Any, req: Any, new_accepted_tokens: Any) -> bool:
    """A request ends at its own stop tokens alone: not at those of the target's configuration."""
    eos, req.eos_token_ids = req.eos_token_ids, None
    try:
        return bool(original(req, new_accepted_tokens))
    finally:
        req.eos_token_ids = eos


def note_round(original: Any, req: Any, num_correct_drafts: int) -> None:
    """Called before a round's tokens are appended. SGLang cuts the list as it cuts the tokens, so they run in step."""
    original(req, num_correct_drafts)
    if req.customized_info is None:
        req.customized_info = {}
    noted = req.customized_info.setdefault(ACCEPTED, [])
    noted += [None] * (len(req.output_ids) - len(noted)) + [int(num_correct_drafts)]


def seed_each(original: Any, cls: Any, batch: Any, vocab_size: int) -> Any:
    """Every request draws from its own seed, which SGLang else takes only in its deterministic mode.

    That mode also makes results independent of the batch, at the price of slower kernels; it remains an option.
    """
    import torch

    info = original(cls, batch, vocab_size)
    if info.sampling_seed is None:
        seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device)
    return info


def draw_alike(original: Any, sampler: Any, probs_BV: Any, info: Any, positions_B: Any, plain: bool) -> Any:
    """A greedy request is to SGLang one that draws from the likeliest token alone, and beside one it numbers every
    request's tokens by their rank. The same seed would then draw another token than in a batch without one.

    A worker asks for nothing but greedy and plain draws, so the greedy rows can be taken apart.
    """
    tokens_B, capture = original(sampler, probs_BV, info, positions_B, True)
    return (tokens_B if plain else _greedy_where_asked(tokens_B, probs_BV, info)), capture


def draw_alike_from_logits(
    original: Any, sampler: Any, logits_BV: Any, info: Any, plain: bool, positions_B: Any
) -> Any:
    """The same where SGLang samples on an NPU."""
    tokens_B = original(sampler, logits_BV, info, True, positions_B)
    return tokens_B if plain else _greedy_where_asked(tokens_B, logits_BV, info)


def _greedy_where_asked(tokens_B: Any, scores_BV: Any, info: Any) -> Any:
    return scores_BV.argmax(-1).to(tokens_B.dtype).where(info.top_ks == 1, tokens_B)
