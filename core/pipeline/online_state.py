"""The state of an `OnlineDraftTrainer` as plain values and tensors on the host, and what it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from torchspec.core.errors import CheckpointError
from torchspec.core.export.selfcheck import Probe
from torchspec.core.interfaces.algorithm import Algorithm, TrainingSample
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.interfaces.features import Features
from torchspec.core.interfaces.target import VocabularyMap
from torchspec.core.pipeline.identity import options_facts, vocabulary_facts
from torchspec.core.pipeline.online_setup import OnlineConfig
from torchspec.core.training.checkpoint import differences
from torchspec.core.training.held import Counts, HeldSample, HeldSamples
from torchspec.core.training.sharding import local
from torchspec.core.training.update import Updater

FORMAT = 1
_PARTS = {"identity", "tensors", "codes", "progress", "random", "counts", "held", "probe"}
_TARGET_FACTS = ("architecture", "num_layers", "hidden_size", "vocab_size")


def identity(
    config: OnlineConfig, algorithm: Algorithm, target: TargetSpec, vocabulary: VocabularyMap, place: tuple[int, int]
) -> dict[str, Any]:
    """JSON: what a state can be continued with. `place`: rank, and how many there are."""
    return {
        "algorithm": algorithm.name,
        "draft": options_facts(algorithm.options),
        "taps": list(algorithm.taps),
        "target": {name: getattr(target, name) for name in _TARGET_FACTS},
        "vocabulary": vocabulary_facts(vocabulary),
        "seed": config.seed,
        "rank": list(place),
    }


def shared_settings(
    config: OnlineConfig, algorithm: Algorithm, target: TargetSpec, vocabulary: VocabularyMap
) -> dict[str, Any]:
    """JSON: what the ranks of a group must have been given alike."""
    own = {"device", "patience", "hold", "draft"}  # draft: may name files, and is in the identity by their contents
    facts = identity(config, algorithm, target, vocabulary, (0, 0))
    plain: dict[str, Any] = json.loads(json.dumps({**config.model_dump(mode="json", exclude=own), **facts}))
    return plain


def saved(
    *,
    identity: dict[str, Any],
    updater: Updater,
    progress: dict[str, Any],
    random: dict[str, Tensor],
    held: HeldSamples,
    with_held: bool,
    probe: Probe | None,
) -> dict[str, Any]:
    """See `OnlineDraftTrainer.state_dict`."""
    samples = held.first(len(held)) if with_held else []
    counts = held.counts
    return {
        "format": FORMAT,
        "identity": identity,
        "tensors": {name: _host(local(tensor)) for name, tensor in updater.tensors().items()},
        "codes": {name: _host(tensor) for name, tensor in updater.codes().items()},
        "progress": progress,
        "random": random,
        "counts": {**asdict(counts), "dropped": counts.dropped + len(held) - len(samples)},
        "held": [_plain(each) for each in samples],
        "probe": None if probe is None else {name: _host(tensor) for name, tensor in vars(probe).items()},
    }


def check(state: Mapping[str, Any], identity: dict[str, Any], updater: Updater) -> None:
    """CheckpointError with every difference."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the state is a {type(state).__name__}, expected what state_dict() returned")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"the state is of format {state.get('format')!r}, this torchspec reads {FORMAT}")
    if missing := sorted(_PARTS - state.keys()):
        raise CheckpointError(f"the state is not whole: {', '.join(missing)} are missing")
    found = list(differences(state["identity"], identity, names=("the state", "this trainer")))
    ours, theirs = updater.tensors(), state["tensors"]
    found += [f"{name} is only on one side" for name in sorted(ours.keys() ^ theirs.keys())]
    found += [
        f"{name}: the state has shape {list(theirs[name].shape)}, this trainer {list(local(ours[name]).shape)}"
        for name in ours.keys() & theirs.keys()
        if theirs[name].shape != local(ours[name]).shape
    ]
    if found:
        listed = "\n".join(f"  - {line}" for line in found)
        raise CheckpointError(f"the state belongs to another training and cannot be continued with this one:\n{listed}")


def fill(state: Mapping[str, Any], updater: Updater, held: HeldSamples, place: torch.device) -> None:
    """Write weights, optimizer and held samples back; these to `place`."""
    tensors = updater.tensors()
    with torch.no_grad():
        for name, tensor in tensors.items():
            local(tensor).copy_(state["tensors"][name])
    updater.filled(tensors, state["codes"])
    held.restore([_held(each, place) for each in state["held"]], Counts(**state["counts"]))


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _plain(held: HeldSample) -> dict[str, Any]:
    features = held.features
    return {
        "name": held.sample.sample_id,
        "tokens": _host(held.sample.input_ids_T),
        "loss_mask": _host(held.sample.loss_mask_T),
        "taps": _host(features.taps_TNH),
        "last": _host(features.last_TH),
        "tap_layers": list(features.tap_layers),
        "norm_state": features.norm_state,
        "epoch": held.epoch,
        "version": held.version,
    }


def _held(plain: Mapping[str, Any], place: torch.device) -> HeldSample:
    ids_T = plain["tokens"].clone()
    features = Features(
        input_ids_T=ids_T,
        taps_TNH=plain["taps"].to(place, copy=True),
        last_TH=plain["last"].to(place, copy=True),
        tap_layers=tuple(plain["tap_layers"]),
        norm_state=plain["norm_state"],
    )
    sample = TrainingSample(sample_id=plain["name"], input_ids_T=ids_T, loss_mask_T=plain["loss_mask"].clone())
    return HeldSample(sample=sample, features=features, epoch=plain["epoch"], version=plain["version"])
