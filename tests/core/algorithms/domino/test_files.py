"""Domino drafts in the published layout: written, read back, held against the independent reader, and refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core import registry
from torchspec.core.algorithms.blocks.serving import Reader
from torchspec.core.algorithms.domino.algorithm import Domino
from torchspec.core.algorithms.domino.options import DominoOptions
from torchspec.core.errors import CheckpointError, ConfigError
from torchspec.core.export.selfcheck import check_files
from torchspec.core.interfaces.algorithm import DraftFiles

OWN = ("projector_type", "shift_label", "pure_draft_prefix_len", "gru_hidden_dim", "emb_dim")


def written(world: Any, layout: str = "plain") -> DraftFiles:
    state = {name: tensor.detach().clone() for name, tensor in world.draft.state_dict().items()}
    files: DraftFiles = world.algorithm.to_files(state, layout)
    return files


@pytest.mark.parametrize(
    "options",
    [{}, {"layer_types": ("full", "sliding"), "sliding_window": 5}, {"sample_from_anchor": True}],
    ids=["full", "sliding", "from the anchor"],
)
def test_files_hold_the_draft_and_an_engine_reads_it_so(
    make_world: Callable[..., Any], options: dict[str, Any]
) -> None:
    world = make_world(dtype=torch.float32, block_size=5, **options)
    assert world.algorithm.layouts == ("plain",)
    files = written(world)
    checked = check_files(world.algorithm, world.draft, files, world.head, world.device, None)
    assert checked.drafted == 4
    algorithm, draft = Domino.from_files(files, world.algorithm.target)
    assert algorithm.geometry == world.algorithm.geometry
    assert algorithm.taps == world.algorithm.taps
    for name, tensor in world.draft.state_dict().items():
        torch.testing.assert_close(draft.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_each_draft_of_the_class_is_read_by_one_algorithm(make_world: Callable[..., Any]) -> None:
    """Domino shares its architecture's name with DFlash."""
    config = written(make_world()).config
    readers = [name for name in registry.algorithms().names() if registry.algorithms().spec(name).reads(config)]
    assert readers == ["domino"]
    own, body = ({n: v for n, v in config["dflash_config"].items() if (n in OWN) == mine} for mine in (True, False))
    beside = {**config, **own, "dflash_config": body}
    assert Domino.form.reads(beside)
    assert Domino.stated_fields(beside) == Domino.stated_fields(config)
    plain = {**config, "dflash_config": body}
    readers = [name for name in registry.algorithms().names() if registry.algorithms().spec(name).reads(plain)]
    assert readers == ["dflash"]


@pytest.mark.parametrize("shifted", [False, True])
def test_fields_stand_where_sglang_reads_them(make_world: Callable[..., Any], shifted: bool) -> None:
    files = written(make_world(gru_hidden_dim=12, emb_dim=7, sample_from_anchor=shifted))
    config = files.config
    assert "sample_from_anchor" not in config, "which no reader of Domino knows"
    assert any("not the last one" in note for note in files.notes) == shifted
    assert config["architectures"] == ["DFlashDraftModel"]
    assert {name: config["dflash_config"][name] for name in OWN} == {
        "projector_type": "domino",
        "shift_label": shifted,
        "pure_draft_prefix_len": 1,
        "gru_hidden_dim": 12,
        "emb_dim": 7,
    }


def as_published(files: DraftFiles, newer: bool) -> DraftFiles:
    """With the config that SpecForge writes (Qwen3-8B-Domino-b16), or the one of its later class."""
    special = dict(files.config["dflash_config"])
    own = {name: special.pop(name) for name in OWN if name != "projector_type"} | {"shift_label": True}
    place: dict[str, Any] = {"domino_config": own} if newer else {"emb_dim": own["emb_dim"]}
    config = {
        **files.config,
        **place,
        "architectures": ["DominoDraftModel" if newer else "DFlashDraftModel"],
        "dflash_config": special if newer else special | own,
    }
    return replace(files, config=config)


def rollout(draft: Any, normed_ZH: Tensor, anchor: int, head: Any) -> list[int]:
    """SGLang's `domino_greedy_rollout` with `shift_label`, by torch's own GRU: the first slot is the anchor's."""
    size, width = normed_ZH.shape[1], draft.geometry.gru_hidden_dim
    gru = torch.nn.GRU(size, width, bias=False, batch_first=True)
    gru.load_state_dict(draft.prefix_gru.state_dict())
    said = [int((head.head_VH @ normed_ZH[0]).argmax())]
    for slot in normed_ZH[1:]:
        _, state = gru(head.embedding_VH[[anchor, *said]][None])
        logits = head.head_VH @ slot + draft.embed_proj(torch.cat((slot, state[0, 0])))
        said.append(int(logits.argmax()))
    return said


@pytest.mark.parametrize("newer", [False, True], ids=["dflash_config", "domino_config"])
def test_published_drafts_are_read_drafted_with_and_written(make_world: Callable[..., Any], newer: bool) -> None:
    made = make_world(dtype=torch.float32, block_size=5, sample_from_anchor=True)
    files = as_published(written(made), newer)
    readers = [name for name in registry.algorithms().names() if registry.algorithms().spec(name).reads(files.config)]
    assert readers == ["domino"]
    algorithm, draft = Domino.from_files(files, made.algorithm.target)
    assert algorithm.geometry.sample_from_anchor
    assert written(replace(made, algorithm=algorithm, draft=draft)).config["dflash_config"]["shift_label"] is True

    feature = made.features(made.tokens(9))
    taps, tokens = feature.taps_TNH[:-1].float(), feature.input_ids_T[1:]
    session = algorithm.drafter(draft, made.head, made.device).open(1)
    proposal = session.propose([taps], [tokens], 9)
    with torch.no_grad():
        normed_ZH = slots(files, made.head, taps, tokens)
        assert proposal.tokens_BL[0].tolist() == rollout(draft, normed_ZH, int(tokens[-1]), made.head)


def slots(files: DraftFiles, head: Any, taps: Tensor, tokens: Tensor) -> Tensor:
    """[Z, H]: of every slot, by the independent reader of blocks."""
    reader = Reader(files, head)
    reader.from_anchor = True
    return reader.states(taps, tokens[-1]).float()


FAULTS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "gates exchanged": lambda t: t.__setitem__("prefix_gru.weight_ih_l0", t["prefix_gru.weight_ih_l0"].roll(10, 0)),
    "state not read": lambda t: t["prefix_gru.weight_hh_l0"].zero_(),
    "state before output": lambda t: t.__setitem__("embed_proj.0.weight", t["embed_proj.0.weight"].flip(1)),
    "no correction": lambda t: t["embed_proj.2.weight"].zero_(),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_tampered_files_fail_the_check(make_world: Callable[..., Any], fault: Any) -> None:
    world = make_world(dtype=torch.float32, block_size=5)
    files = written(world)
    fault(files.tensors)
    with pytest.raises(CheckpointError, match="does not predict"):
        check_files(world.algorithm, world.draft, files, world.head, world.device, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift_label": 1}, "shift_label must be bool"),
        ({"pure_draft_prefix_len": 2}, "pure_draft_prefix_len is 2"),
        ({"emb_dim": "wide"}, "emb_dim must be a positive integer"),
        ({"gru_hidden_dim": 11}, "prefix_gru.weight_ih_l0 is"),
    ],
)
def test_configs_of_other_drafts_are_refused(make_world: Callable[..., Any], change: Any, message: str) -> None:
    world = make_world()
    files = written(world)
    config = {**files.config, "dflash_config": {**files.config["dflash_config"], **change}}
    with pytest.raises(CheckpointError, match=message):
        Domino.from_files(replace(files, config=config), world.algorithm.target)


def test_missing_and_unknown_tensors_are_named(make_world: Callable[..., Any]) -> None:
    world = make_world()
    files = written(world)
    tensors = {name: value for name, value in files.tensors.items() if name != "embed_proj.2.weight"}
    tensors["prefix_gru.bias_ih_l0"] = torch.zeros(30)
    with pytest.raises(CheckpointError, match=r"missing: embed_proj.2.weight; unknown.*prefix_gru.bias_ih_l0"):
        Domino.from_files(replace(files, tensors=tensors), world.algorithm.target)


def test_a_draft_read_from_the_wrong_slots_fails_the_check(make_world: Callable[..., Any]) -> None:
    world = make_world(dtype=torch.float32, block_size=5, sample_from_anchor=True)
    files = written(world)
    files.config["dflash_config"]["shift_label"] = False
    with pytest.raises(CheckpointError, match="does not predict"):
        check_files(world.algorithm, world.draft, files, world.head, world.device, None)


def test_what_the_layout_cannot_hold_is_refused_at_once(make_world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        make_world(vocab_size=100, block_size=2)
    fields = {problem.field for problem in refused.value.problems}
    assert fields == {"draft.vocab_size", "draft.block_size"}


def test_widths_are_the_published_ones() -> None:
    assert (DominoOptions().gru_hidden_dim, DominoOptions().emb_dim) == (1024, 256)
