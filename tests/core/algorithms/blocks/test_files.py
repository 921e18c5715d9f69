"""Drafts of blocks in both published layouts: written, checked, read back, and refused with one clear error each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec.core import registry
from torchspec.core.algorithms.dflash import SPEC
from torchspec.core.algorithms.dflash.algorithm import DFlash
from torchspec.core.errors import CheckpointError, ConfigError
from torchspec.core.export.layout import ExportContext, read_draft, write_draft
from torchspec.core.export.selfcheck import check_files
from torchspec.core.interfaces.algorithm import DraftFiles

Worlds = Callable[..., Any]
PRUNED = {"ids_N": torch.arange(0, 300, 3)}
SLIDING = {"layer_types": ("full", "sliding"), "sliding_window": 9}


def randomised(world: Any) -> Any:
    """Every weight random, norms included, so that no tensor could be left out unnoticed."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in world.draft.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return world


def made(make_world: Worlds, **options: Any) -> Any:
    return randomised(make_world(dtype=torch.float32, block_size=6, **options))


def files_of(world: Any, layout: str = "plain") -> DraftFiles:
    state = {name: value.detach().clone() for name, value in world.draft.state_dict().items()}
    files: DraftFiles = world.algorithm.to_files(state, layout)
    return files


@pytest.mark.parametrize("layout", ["plain", "speculators"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"taps": (0, 2, 5), "mask_token": 17},
        SLIDING,
        {**SLIDING, "sliding_window_non_causal": True},
        {"sliding_window": 3, "num_layers": 3},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 40},
        {"sample_from_anchor": True},
        PRUNED,
        {**PRUNED, **SLIDING, "sample_from_anchor": True, "sliding_window_non_causal": True},
    ],
    ids=["default", "taps", "sliding", "non-causal", "all sliding", "sizes", "from anchor", "pruned", "pruned+"],
)
def test_round_trip_predicts_the_same(make_world: Worlds, tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    world = made(make_world, **options)
    algorithm = world.algorithm
    if layout == "plain" and {"ids_N", "sample_from_anchor"} & options.keys():
        assert algorithm.layouts == ("speculators",)
        fields = {"ids_N": "draft.vocab_size", "sample_from_anchor": "draft.sample_from_anchor"}
        with pytest.raises(ConfigError) as caught:
            files_of(world)
        assert {problem.field for problem in caught.value.problems} == {fields[n] for n in fields.keys() & options}
        return
    if layout == "speculators" and options == SLIDING:
        assert algorithm.layouts == ("plain",)
        with pytest.raises(ConfigError, match=r"draft\.layer_types: vLLM would have full layers see the earlier slots"):
            files_of(world, layout)
        return
    assert layout in algorithm.layouts
    context = ExportContext(head=world.head, device=world.device)
    check = write_draft(algorithm, world.draft, layout, tmp_path / "draft", context)
    assert check.total_variation < 1e-5
    again, loaded = read_draft(tmp_path / "draft", algorithm.target)
    assert (again.name, again.taps, again.geometry) == (algorithm.name, algorithm.taps, algorithm.geometry)
    assert again.options.block_size == 6
    assert loaded.state_dict().keys() == world.draft.state_dict().keys()
    for name, value in world.draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # The files alone start a draft of the same shape.
    fresh = DFlash.create(DFlash.options_class(config=tmp_path / "draft"), algorithm.target)
    assert fresh.geometry == algorithm.geometry
    assert fresh.taps == algorithm.taps


def test_what_engines_read_of_the_files(make_world: Worlds) -> None:
    plain = files_of(made(make_world, **SLIDING, taps=(1, 4)))
    spec = files_of(made(make_world, taps=(1, 4)), "speculators")
    assert plain.config["architectures"] == ["DFlashDraftModel"]
    assert plain.config["dflash_config"] == {"mask_token_id": 299, "target_layer_ids": [1, 4]}
    assert plain.config["block_size"] == spec.config["block_size"] == 6
    assert plain.config["layer_types"] == ["full_attention", "sliding_attention"]
    assert spec.config["aux_hidden_state_layer_ids"] == [2, 5]
    assert spec.config["mask_token_id"] == 299
    assert spec.config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    assert {"embed_tokens.weight", "lm_head.weight", "d2t", "t2d"}.isdisjoint(plain.tensors)
    pruned = files_of(made(make_world, **PRUNED), "speculators")
    assert pruned.tensors["lm_head.weight"].shape == (100, 64)
    assert torch.equal(torch.arange(100) + pruned.tensors["d2t"], PRUNED["ids_N"])


@pytest.mark.parametrize(
    ("options", "plain", "speculators"),
    [
        ({"num_layers": 2}, {}, {"sliding_window_non_causal": True}),
        ({"num_layers": 2, "sliding_window": 3}, {}, {"sliding_window_non_causal": False}),
        (
            {**SLIDING, "sliding_window_non_causal": True},
            {"is_causal": False, "causal": False},
            {"is_causal": False, "sliding_window_non_causal": True},
        ),
        (SLIDING, {}, None),
    ],
    ids=["full", "sliding", "non-causal", "both kinds"],
)
def test_what_is_said_of_causality(
    make_world: Worlds, options: dict[str, Any], plain: dict[str, Any], speculators: dict[str, Any] | None
) -> None:
    """vLLM 0.32.0 takes each of these words for all layers, and the last for false where it is missing."""
    world = made(make_world, **options)

    def said(layout: str) -> dict[str, Any]:
        config = files_of(world, layout).config
        places = (config, config.get("transformer_layer_config", {}), config.get("dflash_config", {}))
        words = ("is_causal", "causal", "sliding_window_non_causal")
        return {name: place[name] for place in places for name in words if name in place}

    assert said("plain") == plain
    if speculators is None:
        assert "speculators" not in world.algorithm.layouts
    else:
        assert said("speculators") == speculators


def test_a_draft_that_no_layout_can_hold(make_world: Worlds) -> None:
    with pytest.raises(
        ConfigError, match=r"draft\.layer_types: engines read full and sliding layers beside each other"
    ):
        make_world(**SLIDING, sample_from_anchor=True)


def test_an_anchor_that_predicts_is_served_nowhere(make_world: Worlds) -> None:
    assert files_of(made(make_world), "speculators").notes == ()
    world = made(make_world, sample_from_anchor=True)
    (note,) = files_of(world, "speculators").notes
    assert "no engine is known to serve a DFlash draft whose anchor's slot predicts" in note
    assert SPEC.unserved is not None
    assert SPEC.unserved(world.algorithm) == note  # before training, too
    assert SPEC.unserved(made(make_world).algorithm) is None


def zlab(files: DraftFiles) -> dict[str, Any]:
    """As z-lab's checkpoints say the same: the block's size beside the taps, rope in the old fields, no window."""
    config = dict(files.config)
    for name in ("rope_parameters", "num_target_layers", "sliding_window", "use_sliding_window", "layer_types"):
        config.pop(name)
    return config | {"dflash_config": {**config["dflash_config"], "block_size": config.pop("block_size")}}


def test_a_config_as_others_write_it(make_world: Worlds) -> None:
    world = made(make_world, taps=(0, 3))
    files = files_of(world)
    algorithm, draft = DFlash.from_files(replace(files, config=zlab(files)), world.algorithm.target)
    assert algorithm.geometry == world.algorithm.geometry
    assert algorithm.taps == (0, 3)
    tensors = dict(files.tensors) | {
        "embed_tokens.weight": world.head.embedding_VH,
        "lm_head.weight": world.head.head_VH,
    }
    DFlash.from_files(replace(files, tensors=tensors), world.algorithm.target)
    assert check_files(algorithm, draft, files, world.head, world.device, None).total_variation < 1e-5


Change = Callable[[DraftFiles], DraftFiles]


def without(name: str) -> Change:
    return lambda files: replace(files, tensors={n: t for n, t in files.tensors.items() if n != name})


def tensor(name: str, value: Tensor) -> Change:
    return lambda files: replace(files, tensors=files.tensors | {name: value})


def says(**fields: Any) -> Change:
    return lambda files: replace(files, config=files.config | fields)


def special(**fields: Any) -> Change:
    return lambda files: says(dflash_config=files.config["dflash_config"] | fields)(files)


DAMAGED: dict[str, tuple[Change, str]] = {
    "a tensor missing": (without("layers.1.self_attn.q_norm.weight"), "missing: layers.1.self_attn.q_norm.weight"),
    "a tensor unknown": (tensor("layers.2.mlp.up_proj.weight", torch.ones(1)), "unknown.*layers.2.mlp.up_proj.weight"),
    "a shape": (tensor("fc.weight", torch.ones(64, 3)), r"fc.weight is \[64, 3\]"),
    "no number": (tensor("norm.weight", torch.full((64,), float("nan"))), "not finite: norm.weight"),
    "another embedding": (tensor("embed_tokens.weight", torch.ones(300, 64)), "embed_tokens"),
    "another head": (tensor("lm_head.weight", torch.ones(300, 64)), "lm_head"),
    "layers of a wrong type": (says(num_hidden_layers="two"), "num_hidden_layers must be a positive integer"),
    "no layers": (says(num_hidden_layers=None), "num_hidden_layers"),
    "a block of a wrong type": (says(block_size="6"), "block_size must be a positive integer"),
    "a block of one": (says(block_size=1), "block_size"),
    "a mask of a wrong type": (special(mask_token_id="x"), "mask_token_id must be a token"),
    "a mask outside": (special(mask_token_id=300), "mask_token"),
    "taps of a wrong type": (special(target_layer_ids=["a"]), "target_layer_ids must be a list of layer numbers"),
    "taps outside": (special(target_layer_ids=[0, 1, 2, 3, 12]), "layers 0 to 7"),
    "special of a wrong type": (says(dflash_config=[1]), "dflash_config must be an object"),
    "kinds unknown": (says(layer_types=["full_attention", "linear_attention"]), "linear_attention"),
    "kinds too few": (says(layer_types=["full_attention"]), "1 kinds for 2 layers"),
    "another target": (says(hidden_size=32), "hidden_size"),
    "another algorithm": (says(architectures=["LlamaForCausalLMEagle3"]), "a DFlash draft here has"),
    "biased": (says(attention_bias=True), "attention_bias"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused(make_world: Worlds, change: Change, message: str) -> None:
    world = made(make_world)
    with pytest.raises(CheckpointError, match=message):
        DFlash.from_files(change(files_of(world)), world.algorithm.target)


def shifted(name: str) -> Change:
    def change(files: DraftFiles) -> DraftFiles:
        return replace(files, config=files.config | {name: [tap + 1 for tap in files.config[name]]})

    return change


def test_the_check_catches_files_that_an_engine_would_read_otherwise(make_world: Worlds) -> None:
    world, full = made(make_world, **SLIDING, taps=(0, 3)), made(make_world, taps=(0, 3))
    plain, spec = files_of(world), files_of(full, "speculators")
    wrong = {
        "taps": (world, special(target_layer_ids=[1, 4])(plain)),
        "taps of speculators": (full, shifted("aux_hidden_state_layer_ids")(spec)),
        "mask": (world, special(mask_token_id=5)(plain)),
        "window": (world, says(sliding_window=5)(plain)),
        "causal": (world, special(causal=False)(plain)),
        "causal by its newer name": (world, says(is_causal=False)(plain)),
        "causal of speculators": (full, says(sliding_window_non_causal=False)(spec)),
        "kinds": (world, says(layer_types=["sliding_attention", "full_attention"])(plain)),
        "rope": (world, says(rope_parameters={"rope_type": "default", "rope_theta": 500.0})(plain)),
        "anchor": (full, says(sample_from_anchor=True)(spec)),
        "norm": (world, tensor("hidden_norm.weight", torch.ones(64))(plain)),
    }
    for name, (of, files) in wrong.items():
        try:
            check_files(of.algorithm, of.draft, files, of.head, of.device, None)
        except CheckpointError as error:
            assert any(words in str(error) for words in ("tap ids are wrong", "does not predict")), name  # noqa: PT017
        else:
            pytest.fail(name)


@pytest.mark.parametrize("layout", ["plain", "speculators"])
def test_no_other_algorithm_reads_them(make_world: Worlds, layout: str) -> None:
    config = json.loads(json.dumps(files_of(made(make_world), layout).config))
    known = registry.algorithms()
    assert [name for name in known.names() if known.spec(name).reads(config)] == ["dflash"]
    for foreign in (
        {"architectures": ["LlamaForCausalLMEagle3"]},
        {"speculators_model_type": "eagle3", "architectures": ["DFlashDraftModel"]},
        {"architectures": "DFlashDraftModel"},
        {},
    ):
        assert not known.spec("dflash").reads(foreign)
