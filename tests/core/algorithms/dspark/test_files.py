"""DSpark drafts in the published layouts: written, read back, held against the independent reader, and refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from torchspec.core.algorithms.dspark.algorithm import DSpark
from torchspec.core.errors import CheckpointError, ConfigError
from torchspec.core.export.selfcheck import check_files
from torchspec.core.interfaces.algorithm import DraftFiles

HEADS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "vanilla": ({}, ("plain", "speculators")),
    "gated": ({"markov_head_type": "gated"}, ("plain",)),
    "rnn": ({"markov_head_type": "rnn", "confidence_head_with_markov": False}, ("plain",)),
    "no confidence": ({"confidence_weight": 0.0}, ("plain", "speculators")),
    "pruned": ({"ids_N": torch.arange(0, 300, 2)}, ("speculators",)),
    "behind the anchor": ({"sample_from_anchor": False}, ("speculators",)),
    "scheduled": ({"min_confidence": 0.25}, ("plain", "speculators")),
}


def written(world: Any, layout: str) -> DraftFiles:
    state = {name: tensor.detach().clone() for name, tensor in world.draft.state_dict().items()}
    files: DraftFiles = world.algorithm.to_files(state, layout)
    return files


@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS.keys())
def test_files_hold_the_draft_and_an_engine_reads_it_so(make_world: Callable[..., Any], case: Any) -> None:
    options, layouts = case
    world = make_world(dtype=torch.float32, **options)
    assert world.algorithm.layouts == layouts
    for layout in layouts:
        files = written(world, layout)
        checked = check_files(world.algorithm, world.draft, files, world.head, world.device, None)
        assert checked.drafted >= 3
        algorithm, draft = DSpark.from_files(files, world.algorithm.target)
        assert DSpark.form.reads(files.config)
        assert algorithm.geometry == world.algorithm.geometry
        assert algorithm.taps == world.algorithm.taps
        assert algorithm.options.min_confidence == world.algorithm.options.min_confidence
        for name, tensor in world.draft.state_dict().items():
            torch.testing.assert_close(draft.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    for layout in {"plain", "speculators"} - set(layouts):
        with pytest.raises(ConfigError):
            written(world, layout)


def test_what_older_engines_need_is_a_layout_that_can_hold_the_draft(make_world: Callable[..., Any]) -> None:
    (whole,) = written(make_world(), "speculators").notes
    assert whole.endswith("they serve the plain layout: torchspec export --format hf")
    (pruned,) = written(make_world(ids_N=torch.arange(0, 300, 3)), "speculators").notes
    assert "--format hf" not in pruned
    assert "serve no draft of a pruned vocabulary" in pruned


def test_fields_stand_where_engines_read_them(make_world: Callable[..., Any]) -> None:
    plain, speculators = (written(make_world(taps=(1, 4)), layout).config for layout in ("plain", "speculators"))
    heads = {
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,
        "block_size": 4,
        "mask_token_id": 299,
    }
    assert plain.items() >= (heads | {"target_layer_ids": [1, 4]}).items()
    assert plain["architectures"] == ["Qwen3DSparkModel"]
    assert speculators.items() >= (heads | {"aux_hidden_state_layer_ids": [2, 5]}).items()
    assert speculators["speculators_model_type"] == "dspark"
    assert speculators["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4


def test_the_names_are_the_published_ones(make_world: Callable[..., Any]) -> None:
    names = {
        kind: set(written(make_world(markov_head_type=kind), "plain").tensors) for kind in ("vanilla", "gated", "rnn")
    }
    own = {
        "markov_head.markov_w1.weight",
        "markov_head.markov_w2.weight",
        "confidence_head.proj.weight",
        "confidence_head.proj.bias",
    }
    assert {name for name in names["vanilla"] if "_head." in name} == own
    assert names["gated"] - names["vanilla"] == {"markov_head.gate_proj.weight", "markov_head.gate_proj.bias"}
    assert names["rnn"] - names["vanilla"] == {"markov_head.joint_proj.weight", "markov_head.joint_proj.bias"}


def test_a_deepspec_checkpoint_is_read(make_world: Callable[..., Any]) -> None:
    """Fields at the top level alone, no word of the anchor, and the target's embedding and head beside the draft."""
    world = make_world(dtype=torch.float32)
    files = written(world, "plain")
    config = {
        name: value for name, value in files.config.items() if name not in ("dflash_config", "sample_from_anchor")
    }
    target = {"embed_tokens.weight": world.head.embedding_VH, "lm_head.weight": world.head.head_VH}
    algorithm, _ = DSpark.from_files(DraftFiles(config=config, tensors=files.tensors | target), world.algorithm.target)
    assert algorithm.geometry == world.algorithm.geometry
    other, _ = DSpark.from_files(replace(files, config=config | {"dspark_bonus_anchor": True}), world.algorithm.target)
    assert not other.geometry.sample_from_anchor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"markov_rank": None}, "markov_rank"),
        ({"markov_rank": 5}, "markov_w1"),
        ({"markov_head_type": "markov"}, "vanilla, gated, rnn"),
        ({"markov_head_type": "gated"}, "gate_proj"),
        ({"enable_confidence_head": False}, "confidence_head.proj"),
        ({"confidence_head_with_markov": False}, "confidence_head.proj"),
        ({"min_confidence": 1.5}, "min_confidence"),
    ],
)
def test_files_that_do_not_fit_their_config_are_refused(
    make_world: Callable[..., Any], change: dict[str, Any], message: str
) -> None:
    world = make_world(dtype=torch.float32)
    files = written(world, "plain")
    config = {name: value for name, value in (files.config | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        DSpark.from_files(replace(files, config=config), world.algorithm.target)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"markov_head_type": "gated", "sample_from_anchor": False}, "draft.markov_head_type"),
        ({"markov_head_type": "rnn", "ids_N": torch.arange(100)}, "draft.markov_head_type"),
        ({"min_confidence": 0.5, "confidence_weight": 0.0}, "draft.min_confidence"),
        ({"draft_config": {"enable_confidence_head": True}, "confidence_weight": 0.0}, "draft.confidence_weight"),
        ({"draft_config": {"markov_rank": 9}}, "draft.markov_rank"),
        ({"draft_config": {"markov_head_type": "x"}}, "draft.config"),
        ({"draft_config": {"architectures": ["DFlashDraftModel"]}}, "draft.config"),
    ],
)
def test_drafts_that_could_not_be_served_or_contradict_are_refused(
    make_world: Callable[..., Any], options: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_world(**options)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_a_file_that_says_less_takes_the_options(make_world: Callable[..., Any]) -> None:
    world = make_world(draft_config={"confidence_head_with_markov": False}, sample_from_anchor=False)
    geometry = world.algorithm.geometry
    assert (geometry.confidence_head_with_markov, geometry.sample_from_anchor) == (False, False)
    assert world.algorithm.decay == pytest.approx(2.718281828459045**-0.25)
