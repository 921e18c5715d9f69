"""Domino drafts in the published layout: written, read back, held against the independent reader, and refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from torchspec.core import registry
from torchspec.core.algorithms.domino.algorithm import Domino
from torchspec.core.errors import CheckpointError, ConfigError
from torchspec.core.export.selfcheck import check_files
from torchspec.core.interfaces.algorithm import DraftFiles

OWN = ("projector_type", "shift_label", "pure_draft_prefix_len", "gru_hidden_dim", "emb_dim")


def written(world: Any, layout: str = "plain") -> DraftFiles:
    state = {name: tensor.detach().clone() for name, tensor in world.draft.state_dict().items()}
    files: DraftFiles = world.algorithm.to_files(state, layout)
    return files


@pytest.mark.parametrize(
    "options", [{}, {"layer_types": ("full", "sliding"), "sliding_window": 5}], ids=["full", "sliding"]
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


def test_fields_stand_where_sglang_reads_them(make_world: Callable[..., Any]) -> None:
    config = written(make_world(gru_hidden_dim=12, emb_dim=7)).config
    assert config["architectures"] == ["DFlashDraftModel"]
    assert {name: config["dflash_config"][name] for name in OWN} == {
        "projector_type": "domino",
        "shift_label": False,
        "pure_draft_prefix_len": 1,
        "gru_hidden_dim": 12,
        "emb_dim": 7,
    }


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
        ({"shift_label": True}, "shift_label is True"),
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


def test_what_the_layout_cannot_hold_is_refused_at_once(make_world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        make_world(sample_from_anchor=True, vocab_size=100, block_size=2)
    fields = {problem.field for problem in refused.value.problems}
    assert fields == {"draft.sample_from_anchor", "draft.vocab_size", "draft.block_size"}
