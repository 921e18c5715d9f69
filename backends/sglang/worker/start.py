"""Starting SGLang for a worker, and proving that its processes do what the plug-in is there for."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchspec.backends.sglang.worker.arguments import Shape, engine_arguments, environment, read_shape
from torchspec.backends.sglang.worker.orders import Orders
from torchspec.backends.sglang.worker.runner import SglangRunner
from torchspec.backends.sglang.worker.versions import TESTED, check_version
from torchspec.core.errors import UnavailableError
from torchspec.core.features.shared import SharedMemoryStore
from torchspec.core.interfaces.engine import CaptureRequest
from torchspec.core.workers.image_proof import images_refused
from torchspec.core.workers.runner import Ask, Facts, WorkerSettings

log = logging.getLogger(__name__)

_SHIMS = Path(__file__).parent / "cpu_shims"
_PROOF_SECONDS = 300.0


def start_engine(settings: WorkerSettings) -> SglangRunner:
    """ConfigError for settings that SGLang cannot take; UnavailableError when it is not here, or not one that fits."""
    shape = read_shape(settings.target)
    arguments = engine_arguments(settings, shape)
    Orders(
        store=None if settings.store is None or not settings.taps else str(settings.store),
        store_bytes=settings.store_bytes,
        taps=settings.taps,
        cpu_chains=settings.device == "cpu" and settings.draft is not None,
    ).give(environment(settings, sorted(os.sched_getaffinity(0))))
    if settings.device == "cpu" and str(_SHIMS) not in sys.path:
        sys.path.append(str(_SHIMS))  # last, so that what is installed goes first; SGLang's processes inherit the path
    sglang, version = _import_sglang()
    engine = sglang.Engine(**arguments, custom_sigquit_handler=_wait_and_see)
    runner = None
    try:
        runner = SglangRunner(engine, settings, _facts(engine, version, shape))
        _prove(runner, settings)
        refused = images_refused(runner, settings, runner.images.ids_of, _PROOF_SECONDS)
        runner.facts = replace(runner.facts, no_images=refused)
        runner.forget_counters()
    except BaseException:
        (runner.close if runner is not None else engine.shutdown)()
        raise
    return runner


def _wait_and_see(*_: object) -> None:
    """When a process of SGLang's fails while it starts, SGLang notices by itself and raises. The handler that it would
    install kills this process on the spot."""


def _import_sglang() -> tuple[Any, str]:
    try:
        import sglang
    except ImportError as error:
        raise UnavailableError(
            f"SGLang cannot be imported by {sys.executable}: {error}\n    remedy: install what backends/sglang/pins "
            "lists for this device into an environment, and name its Python as engine.python"
        ) from error
    version = str(sglang.__version__)
    warning = check_version(version)
    if warning is not None:
        log.warning(warning)
    return sglang, version


def _facts(engine: Any, version: str, shape: Shape) -> Facts:
    config = engine.tokenizer_manager.model_config
    return Facts(
        engine="sglang",
        engine_version=version,
        layers=shape.layers,
        hidden_size=int(config.hidden_size),
        itemsize=int(config.dtype.itemsize),
        context=min(shape.context, int(config.context_len)),
        vocab_size=int(config.vocab_size),
        norm_state="post_norm",
        no_images=None,  # until shown otherwise
    )


def _prove(runner: SglangRunner, settings: WorkerSettings) -> None:
    """One tiny piece of work of each kind, and a look at what only the plug-in brings about."""
    if settings.taps:
        _prove_capture(runner, settings)
    prompt = (0, 1)
    if settings.draft is not None:
        (written,) = runner.write([Ask(input_ids=prompt, max_new_tokens=4, temperature=0.0, seed=0, stop=())])
        if written.result(_PROOF_SECONDS).accepted is None:
            raise _not_loaded(runner, "a text was written with the draft and its rounds were not reported")
        return
    # Hot, so that two draws of eight tokens are the same only if their seeds are what decides; and in batches of two
    # kinds, which must not matter.
    ask = Ask(input_ids=prompt, max_new_tokens=8, temperature=100.0, seed=1, stop=())
    alone = runner.write([ask])[0].result(_PROOF_SECONDS)
    (greedy,) = runner.write([Ask(input_ids=prompt, max_new_tokens=12, temperature=0.0, seed=0, stop=())])
    beside = runner.write([ask])[0].result(_PROOF_SECONDS)
    greedy.result(_PROOF_SECONDS)
    if alone.tokens != beside.tokens:
        raise _not_loaded(runner, "two texts of one seed differ")


def _prove_capture(runner: SglangRunner, settings: WorkerSettings) -> None:
    ids = (0, 1)
    record_id = "torchspec-proof"
    (proof,) = runner.capture([CaptureRequest(record_id=record_id, input_ids=ids)])
    proof.result(_PROOF_SECONDS)
    store = SharedMemoryStore(root=settings.store)
    ref = store.find(record_id)
    features = store.get(ref)
    store.remove(ref)
    store.close()
    if tuple(features.input_ids_T.tolist()) != ids or features.tap_layers != settings.taps:
        raise _not_loaded(runner, "a record is not of the tokens and layers asked for")


def _not_loaded(runner: SglangRunner, what: str) -> UnavailableError:
    return UnavailableError(
        f"torchspec's plug-in did not load in SGLang's scheduler: {what}. This is SGLang "
        f"{runner.facts.engine_version}, torchspec is tested with {', '.join(TESTED)}; SGLang's log says why (look for "
        "'plugin' and 'hook' there). A variable SGLANG_PLUGINS that doesn't name torchspec keeps it out"
    )
