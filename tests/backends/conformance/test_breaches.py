"""Every breach of the engine contract that we know of is found: each is planted in the hf engine, on a tiny target."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchspec.backends.api import Captured, CaptureRequest, Features, FeatureSink, Quarantined, RecordRef
from torchspec.backends.conformance import CHECKS, Setting, Subject
from torchspec.backends.conformance.capture import START
from torchspec.backends.hf.engine import HfEngine
from torchspec.core.conformance.checks import perform
from torchspec.core.features.memory import MemoryStore, take

CHECK = {check.name: check for check in CHECKS}


class Engine(HfEngine):
    """Whole; what is broken is told by class attributes, or overridden."""

    shift = 0
    """Layers that taps are off by."""

    def change(self, features: Features, batch: int) -> Features:
        return features

    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        found = self.captured(batch, taps)
        return [
            result if isinstance(result, Quarantined) else sink.put(result[0], self.change(result[1], len(batch)))
            for result in found
        ]

    def captured(
        self, batch: Sequence[CaptureRequest], taps: Sequence[int]
    ) -> list[tuple[str, Features] | Quarantined]:
        store = MemoryStore()
        found = super().capture(batch, [tap + self.shift for tap in taps], store)
        return [
            (each.record_id, replace(take(store, each), tap_layers=tuple(taps)))
            if isinstance(each, RecordRef)
            else each
            for each in found
        ]


class OffByOne(Engine):
    shift = -1


class Mislabelled(Engine):
    def change(self, features: Features, batch: int) -> Features:
        return replace(features, norm_state="pre_norm")


class PreNormAsPost(Engine):
    def __init__(self, target: Any) -> None:
        super().__init__(target, norm_state="pre_norm")

    def change(self, features: Features, batch: int) -> Features:
        return replace(features, norm_state="post_norm")


class Shifted(Engine):
    """Each row holds the state of the token before."""

    def change(self, features: Features, batch: int) -> Features:
        return replace(features, taps_TNH=features.taps_TNH.roll(1, 0), last_TH=features.last_TH.roll(1, 0))


class Cut(Engine):
    """Without the last token's state, as engines that sample from it have it."""

    def change(self, features: Features, batch: int) -> Features:
        if len(features.last_TH) == 1:
            return features
        return replace(
            features,
            input_ids_T=features.input_ids_T[:-1],
            taps_TNH=features.taps_TNH[:-1],
            last_TH=features.last_TH[:-1],
        )


class Swapped(Engine):
    """The first two samples' states under each other's tokens, where they are as long."""

    def captured(self, batch: Sequence[CaptureRequest], taps: Sequence[int]) -> list[Any]:
        found: list[Any] = list(super().captured(batch, taps))
        for a in range(len(found)):
            for b in range(a):
                one, other = found[a], found[b]
                if len(one[1].last_TH) == len(other[1].last_TH):
                    found[a] = (one[0], replace(other[1], input_ids_T=one[1].input_ids_T))
                    found[b] = (other[0], replace(one[1], input_ids_T=other[1].input_ids_T))
                    return found
        return found


class Reversed(Engine):
    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        return super().capture(batch, taps, sink)[::-1]


class BatchDependent(Engine):
    def change(self, features: Features, batch: int) -> Features:
        return replace(features, taps_TNH=features.taps_TNH * (1 + 0.01 * (batch > 1)))


class Prefixes(Engine):
    """Keeps prefixes, and hands out zeros for what it has read before."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.known: set[tuple[int, ...]] = set()

    def change(self, features: Features, batch: int) -> Features:
        ids = tuple(features.input_ids_T.tolist())
        before, self.known = self.known, self.known | {ids}
        if ids not in before:
            return features
        taps_TNH = features.taps_TNH.clone()
        taps_TNH[: len(ids) // 2] = 0
        return replace(features, taps_TNH=taps_TNH)


class Clamping(Engine):
    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        top = self.describe().vocab_size - 1
        told = [replace(each, input_ids=[min(max(0, t), top) for t in each.input_ids] or [0]) for each in batch]
        return super().capture(told, taps, sink)


class Truncating(Engine):
    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        most = self.describe().max_position_embeddings
        return super().capture([replace(each, input_ids=list(each.input_ids)[:most]) for each in batch], taps, sink)


class Silent(Engine):
    def capture(self, batch: Sequence[CaptureRequest], taps: Sequence[int], sink: FeatureSink) -> list[Captured]:
        most = self.describe().max_position_embeddings
        fit = [each for each in batch if len(each.input_ids) <= most]
        found = iter(super().capture(fit, taps, sink))
        return [next(found) if each in fit else Quarantined(record_id=each.record_id, reason="") for each in batch]


class NotFinite(Engine):
    def change(self, features: Features, batch: int) -> Features:
        features.taps_TNH[0, 0, 0] = float("nan")
        return features


class Misdescribed(Engine):
    def describe(self) -> Any:
        return replace(super().describe(), head_dim=7)


class SecondChoice(Engine):
    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        return [[(token + 1) % 100 for token in text] for text in super().generate(prompts, **told)]


class Talkative(Engine):
    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        return [[*text, text[-1]] for text in super().generate(prompts, **told)]


class Seedless(Engine):
    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        return super().generate(prompts, **{**told, "seed": 5})


class Neighbourly(Engine):
    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        return super().generate(prompts, **{**told, "seed": told.get("seed", 0) + len(prompts)})


class GreedilyNeighbourly(Engine):
    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        texts = super().generate(prompts, **told)
        if len(prompts) > 1 or told.get("temperature"):
            return texts
        return [[*text[:-1], (text[-1] + 1) % 100] for text in texts]


class Uniform(Engine):
    """Its texts depend on seed and prompt alone, and not on the target."""

    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        if not told.get("temperature"):
            return super().generate(prompts, **told)
        draws = [torch.Generator().manual_seed(hash((told["seed"], *prompt)) % 2**40) for prompt in prompts]
        return [torch.randint(5, 300, (told["max_new_tokens"],), generator=draw).tolist() for draw in draws]


class Lukewarm(Engine):
    """Knows one temperature."""

    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        return super().generate(prompts, **{**told, "temperature": float(told.get("temperature", 0) > 0)})


class Cold(Engine):
    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        return super().generate(prompts, **{**told, "temperature": told.get("temperature", 0) / 2})


class Endless(Engine):
    """Knows no end of a turn."""

    def __init__(self, target: Any) -> None:
        super().__init__(replace(target, spec=replace(target.spec, eos_token_ids=())))


class Swallowing(Engine):
    """Its texts come without the token that ended them."""

    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        ends = self.describe().eos_token_ids
        return [[token for token in text if token not in ends] for text in super().generate(prompts, **told)]


class Tapping(Engine):
    """Its sessions cannot be without taps."""

    def open(self, prompts: Any, taps: Any) -> Any:
        return super().open(prompts, taps or (0,))


class KeepingCounts(Engine):
    """Its sessions roll back in the order that rows had before `keep`."""

    def open(self, prompts: Any, taps: Any) -> Any:
        session = super().open(prompts, taps)
        rollback, keep = session.rollback, session.keep

        def kept(rows: Any) -> None:
            keep(rows)
            session.rollback = lambda count_B: rollback(count_B.flip(0))  # type: ignore[method-assign]

        session.keep = kept  # type: ignore[method-assign]
        return session


class Forgetful(Engine):
    """Its sessions do not roll back."""

    def open(self, prompts: Any, taps: Any) -> Any:
        session = super().open(prompts, taps)
        session.rollback = lambda count_B: None  # type: ignore[method-assign]
        return session


class Keeping(Engine):
    """Its sessions drop the wrong rows."""

    def open(self, prompts: Any, taps: Any) -> Any:
        session = super().open(prompts, taps)
        keep = session.keep
        session.keep = lambda rows: keep(sorted(rows))  # type: ignore[method-assign]
        return session


class Undead(Engine):
    def close(self) -> None:
        """Lets go of nothing."""


class Twin(Engine):
    """Of two tokens that are as good, it takes the other when a prompt is alone."""

    def generate(self, prompts: Any, **told: Any) -> list[list[int]]:
        texts = super().generate(prompts, **told)
        if len(prompts) > 1 or told.get("temperature"):
            return texts
        return [[(text[0] + 150) % 300, *text[1:]] for text in texts]


FEATURES, AGAIN = "capture: taps and last hidden states", "capture: a second time"
SAMPLED, TURN, BESIDE = "text: sampled from the target", "text: the end of a turn", "text: alone and beside others"
BREACHES: dict[type[Engine], str] = {
    OffByOne: FEATURES,
    Mislabelled: FEATURES,
    PreNormAsPost: FEATURES,
    Shifted: FEATURES,
    Cut: FEATURES,
    Reversed: FEATURES,
    NotFinite: FEATURES,
    Swapped: "capture: many samples in order",
    BatchDependent: "capture: batch invariance",
    Prefixes: AGAIN,
    Clamping: "capture: samples that no target reads",
    Truncating: "capture: a sample that is too long",
    Silent: "capture: a sample that is too long",
    Misdescribed: "target: described as its files do",
    SecondChoice: "text: greedy",
    Talkative: "text: greedy",
    Seedless: "text: seeds",
    Neighbourly: BESIDE,
    GreedilyNeighbourly: BESIDE,
    Uniform: SAMPLED,
    Lukewarm: SAMPLED,
    Cold: SAMPLED,
    Tapping: "decode: steps and rollbacks",
    KeepingCounts: "decode: steps and rollbacks",
    Forgetful: "decode: steps and rollbacks",
    Keeping: "decode: steps and rollbacks",
    Undead: "errors: a closed engine",
}


@pytest.fixture(scope="module")
def target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a final norm that has weights: a norm of ones applied twice is applied once."""
    place = tmp_path_factory.mktemp("normed") / "target"
    with changed(tiny_target, place) as tensors:
        drawn = torch.randn(len(tensors["model.norm.weight"]), generator=torch.Generator().manual_seed(0))
        tensors["model.norm.weight"] += 0.3 * drawn
    return place


@contextmanager
def changed(target: Path, place: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a copy of the target."""
    shutil.copytree(target, place)
    tensors = load_file(place / "model.safetensors")
    yield tensors
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def subject_of(kind: type[Engine], target: Path, dtype: str = "auto") -> Subject:
    setting = Setting(name="hf", target=str(target), device="cpu", dtype=dtype)
    return Subject(setting, lambda name, options: kind.load(options))


@pytest.mark.parametrize("kind", BREACHES, ids=lambda kind: kind.__name__)
def test_an_engine_that_breaks_its_contract(kind: type[Engine], target: Path) -> None:
    result = perform(CHECK[BREACHES[kind]], subject_of(kind, target))
    assert result.status == "FAIL", result


@pytest.mark.parametrize("name", [name for name in CHECK if not name.startswith("training")])
def test_an_engine_that_keeps_it(name: str, target: Path) -> None:
    result = perform(CHECK[name], subject_of(Engine, target))
    assert result.status == "PASS", result


def test_capabilities_that_mean_nothing(target: Path) -> None:
    subject = subject_of(Engine, target)
    for breach in ({"capabilities": frozenset({"capture"})}, {"capabilities": subject.spec.capabilities | {"serve"}}):
        broken = subject_of(Engine, target)
        broken.spec = replace(subject.spec, **breach)
        assert perform(CHECK["spec: what is declared"], broken).status == "FAIL"


def test_the_state_of_the_norm_is_taken_into_account(target: Path) -> None:
    class PreNorm(Engine):
        def __init__(self, target: Any) -> None:
            super().__init__(target, norm_state="pre_norm")

    result = perform(CHECK[FEATURES], subject_of(PreNorm, target))
    assert result.status == "PASS", result


@pytest.fixture(scope="module")
def ended(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its turns end with a token that its greedy text comes to."""
    subject = subject_of(Engine, target)
    texts = subject.engine().generate(subject.prompts(64), max_new_tokens=20)
    token = next(token for text in texts for n, token in enumerate(text) if n >= 3 and token not in text[:n])
    place = tmp_path_factory.mktemp("ended") / "target"
    shutil.copytree(target, place)
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))
    return place


def test_the_end_of_a_turn(ended: Path) -> None:
    result = perform(CHECK[TURN], subject_of(Engine, ended))
    assert result.status == "PASS", result
    assert "tokens to the end of the turn" in result.text
    for kind in (Endless, Swallowing):
        assert perform(CHECK[TURN], subject_of(kind, ended)).status == "FAIL", kind


def test_a_target_whose_turns_do_not_end(target: Path, tmp_path: Path) -> None:
    place = tmp_path / "endless"
    shutil.copytree(target, place)
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    result = perform(CHECK[TURN], subject_of(Engine, place))
    assert (result.status, result.text[:23]) == ("PASS", "no end of turn found wi"), result


def test_of_two_tokens_that_are_as_good_either_may_come(target: Path, tmp_path: Path) -> None:
    place = tmp_path / "twins"
    with changed(target, place) as tensors:
        embedding_VH = tensors["model.embed_tokens.weight"]
        embedding_VH[150:] = embedding_VH[:150]
    result = perform(CHECK[BESIDE], subject_of(Twin, place))
    assert result.status == "PASS", result


def test_draws_are_compared_across_batches_in_float32_only(target: Path) -> None:
    result = perform(CHECK[BESIDE], subject_of(Neighbourly, target, "bfloat16"))
    assert result.status == "PASS", result
    assert "sampled text is compared in float32 only" in result.text


def test_what_is_not_checked_is_said(target: Path) -> None:
    result = perform(CHECK["spec: what is declared"], subject_of(Engine, target))
    assert result.text.endswith("; not checked here: serve, parts, streamed, tensor_mesh")


def test_two_trainings_fit_into_the_deadline_of_their_check() -> None:
    assert CHECK["training: the losses of transformers"].seconds > 2 * START


def test_the_api_reads_targets_and_is_light() -> None:
    code = (
        "import sys; import torchspec.backends.api as api; assert 'transformers' not in sys.modules; "
        "from torchspec.backends.api import read_target_spec, running_dtype; "
        "assert {'read_target_spec', 'running_dtype'} <= {*api.__all__}; "
        "from torchspec.core.models import target_spec; assert read_target_spec is target_spec.read_target_spec"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
