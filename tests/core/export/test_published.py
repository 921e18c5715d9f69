"""Drafts that others published are read as what they are, written in every layout that can hold them, and refused by
name where something in them could not be kept."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchspec.core import registry
from torchspec.core.errors import CheckpointError, ConfigError
from torchspec.core.export.conversion import Read, check_source, convert, refusals
from torchspec.core.export.layout import ExportContext, read_draft, recognise
from torchspec.core.export.weights import read_tensors
from torchspec.core.interfaces.engine import TargetSpec
from torchspec.core.models.target_head import load_target_head
from torchspec.core.models.target_spec import read_target_spec

KINDS = (
    "eagle", "specforge", "specforge-state", "specforge-eagle3.1", "legacy-norms", "angelslim", "modelopt", "torchspec",
    "speculators-0.1", "speculators-0.6", "z-lab", "torchspec-dflash", "speculators-dflash", "specforge-dspark",
    "torchspec-dspark", "specforge-domino", "specforge-peagle", "speculators-peagle",
)  # fmt: skip
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def target(published_target: Path) -> TargetSpec:
    return read_target_spec(published_target)


@pytest.fixture(scope="module")
def context(published_target: Path) -> ExportContext:
    head = load_target_head(published_target, dtype=torch.float32, device=torch.device("cpu"))
    return ExportContext(head=head, device=registry.load_device("cpu"))


@pytest.fixture
def write(tmp_path: Path, published_drafts: ModuleType, context: ExportContext) -> Write:
    """write(kind, config={...}, tensors={...}, inner={...}): the directory, with these fields and tensors put into it
    (None: taken out); `inner` are fields of the layer's config of the speculators layout."""
    ends = {
        "embedding": context.head.embedding_VH,
        "head": context.head.rows(torch.arange(300)),
        "norm": context.head.normed(torch.full((1, 64), 1.0), "pre_norm")[0],
    }

    def make(kind: str, **changes: dict[str, Any]) -> Path:
        directory = tmp_path / kind
        published_drafts.PUBLISHED[kind].write(directory, ends)
        path = directory / "config.json"
        config = changed(json.loads(path.read_text()), changes.get("config", {}))
        if "inner" in changes:
            config["transformer_layer_config"] = changed(config["transformer_layer_config"], changes["inner"])
        path.write_text(json.dumps(config))
        if "tensors" in changes:
            tensors = changed(load_file(directory / "model.safetensors"), changes["tensors"])
            save_file(tensors, directory / "model.safetensors")
        return directory

    return make


def changed(values: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**values, **by}.items() if value is not None}


def test_every_kind_is_here(published_drafts: ModuleType) -> None:
    assert set(KINDS) == published_drafts.PUBLISHED.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_read_and_written_in_every_layout_that_can_hold_it(
    write: Write, published_drafts: ModuleType, target: TargetSpec, context: ExportContext, tmp_path: Path, kind: str
) -> None:
    directory, expected = write(kind), published_drafts.PUBLISHED[kind]
    read = Read.of(directory, target)
    assert (read.found.spec.name, read.algorithm.layouts) == (expected.name, expected.layouts)
    assert refusals(read).keys() == {"plain", "speculators"} - set(expected.layouts)
    source = check_source(read, context)
    assert (source is None) == (read.found.layout not in expected.layouts)
    stored, _ = read_tensors(directory)
    fc = next(tensor for name, tensor in stored.items() if name in ("fc.weight", "context_proj.weight"))
    for layout in expected.layouts:
        done = convert(read, layout, tmp_path / layout, context, None)
        assert done.outcome.total_variation < 1e-5
        written = load_file(tmp_path / layout / "model.safetensors")
        assert done.dtype == fc.dtype
        assert torch.equal(written["fc.weight"], fc)
        if "lm_head.weight" in stored:
            assert torch.equal(written["lm_head.weight"], stored["lm_head.weight"])
        if "d2t" in written:
            assert torch.equal(written["d2t"], stored["d2t"])
        again = Read.of(tmp_path / layout, target)
        assert (again.algorithm.geometry, again.algorithm.taps) == (read.algorithm.geometry, read.algorithm.taps)
        for name, value in read.draft.state_dict().items():
            assert torch.equal(again.draft.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("kind", "taps"),
    [("eagle", (1, 3, 4)), ("speculators-0.1", (1, 3, 4)), ("speculators-0.6", (1, 2, 6)), ("z-lab", (1, 2, 3, 4, 5)),
     ("torchspec-dflash", (1, 2, 3, 4, 5)), ("speculators-dflash", (1, 2, 3, 4, 5)), ("modelopt", (1, 3, 4))],
)  # fmt: skip
def test_tapped_layers(write: Write, target: TargetSpec, kind: str, taps: tuple[int, ...]) -> None:
    assert Read.of(write(kind), target).algorithm.taps == taps


def test_the_first_step_is_that_of_eagles_own_model(write: Write, target: TargetSpec, context: ExportContext) -> None:
    """By the definition in its `model/cnets.py`, in float64: rotary base 10000 where config.json has none, the target's
    embedding, `d2t` as offsets."""
    directory = write("eagle")
    w = {name: t.double() if t.is_floating_point() else t for name, t in read_tensors(directory)[0].items()}
    torch.manual_seed(1)
    taps_TNH, tokens_T = torch.randn(7, 3, 64), torch.randint(0, 300, (7,))

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def heads(x: Tensor, kind: str) -> Tensor:
        made = (x @ w[f"midlayer.self_attn.{kind}_proj.weight"].T).view(7, -1, 16)
        if kind == "v":
            return made
        turned = torch.empty_like(made)
        for place in range(7):
            for pair in range(8):
                angle = place * 10000.0 ** (-2 * pair / 16)
                a, b = made[place, :, pair], made[place, :, pair + 8]
                turned[place, :, pair] = a * math.cos(angle) - b * math.sin(angle)
                turned[place, :, pair + 8] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    feature = taps_TNH.flatten(1).double() @ w["fc.weight"].T
    embedded = context.head.embedding_VH[tokens_T].double()
    both = torch.cat((rms(embedded, "midlayer.input_layernorm"), rms(feature, "midlayer.hidden_norm")), -1)
    q, k, v = (heads(both, kind) for kind in "qkv")
    mixed = torch.stack([((q[6, h] @ k[:, h // 2].T) / 4).softmax(-1) @ v[:, h // 2] for h in range(4)])
    x = feature[6] + mixed.flatten() @ w["midlayer.self_attn.o_proj.weight"].T
    inner = rms(x, "midlayer.post_attention_layernorm")
    gate, up = (inner @ w[f"midlayer.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    x = x + (gate.sigmoid() * gate * up) @ w["midlayer.mlp.down_proj.weight"].T
    chances = (rms(x, "norm") @ w["lm_head.weight"].T).softmax(-1)
    expected_V = torch.zeros(300, dtype=torch.float64)
    for drafted, chance in enumerate(chances):
        expected_V[drafted + int(w["d2t"][drafted])] = chance

    algorithm, draft = read_draft(directory, target)
    session = algorithm.drafter(draft, context.head, context.device).open(1)
    proposal = session.propose([taps_TNH], [tokens_T], 1, temperature=1.0)
    assert proposal.probs_BLV is not None
    torch.testing.assert_close(proposal.probs_BLV[0, 0].double(), expected_V, rtol=1e-4, atol=1e-6)


def test_what_a_config_leaves_unsaid_is_its_classs_and_not_the_targets(write: Write, target: TargetSpec) -> None:
    """As engines build a config: a Llama's eps, context and base, a Qwen3's head size; the target's are others."""
    gone = {"rms_norm_eps": None, "max_position_embeddings": None}
    geometry = Read.of(write("eagle", config=gone), target).algorithm.geometry
    assert geometry.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (geometry.rms_norm_eps, geometry.max_position_embeddings) == (1e-6, 2048)
    assert (target.rms_norm_eps, target.rope_parameters["rope_theta"]) == (1e-5, 500000.0)
    with pytest.raises(CheckpointError, match=r"q_norm.weight is \[16\], expected \[128\]"):
        Read.of(write("z-lab", config={"head_dim": None}), target)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 64}},
         {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 1e6}),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, {"rope_type": "default", "rope_theta": 1e6}),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
         {"rope_type": "default", "rope_theta": 77.0}),
    ],
    ids=["yarn", "llama3", "mrope", "rope_parameters"],
)  # fmt: skip
def test_rotation_is_carried_over(
    write: Write, target: TargetSpec, context: ExportContext, tmp_path: Path, fields: dict, rope: dict
) -> None:
    read = Read.of(write("specforge", config=fields), target)
    assert read.algorithm.geometry.rope_parameters == rope
    for layout in read.algorithm.layouts:
        assert convert(read, layout, tmp_path / layout, context, None).source is not None


def test_taps_are_read_by_whoever_numbers_them(write: Write, target: TargetSpec, published_drafts: ModuleType) -> None:
    """A list in eagle_config as SGLang does, one at the top, which vLLM alone reads, as vLLM does; four of them."""
    torch.manual_seed(2)
    four = {"fc.weight": torch.randn(64, 4 * 64, dtype=torch.bfloat16)}
    name = "eagle_aux_hidden_state_layer_ids"
    read = Read.of(write("specforge", config={"eagle_config": {name: [0, 2, 5, 7]}}, tensors=four), target)
    assert read.algorithm.taps == (0, 2, 5, 7)
    assert any("as SGLang numbers it" in note for note in read.found.files.notes)
    read = Read.of(write("angelslim", config={name: [1, 3, 6]}), target)
    assert read.algorithm.taps == (0, 2, 5)
    assert any("vLLM alone looks" in note for note in read.found.files.notes)
    with pytest.raises(CheckpointError, match=r"fc reads 4 taps of 64 values and config.json says 3"):
        Read.of(write("legacy-norms", config={"use_aux_norm": None}, tensors={
            **four, **{f"aux_norm_{place}.weight": None for place in ("low", "mid", "high")}
        }), target)  # fmt: skip


def test_a_norm_of_all_taps_is_read_where_engines_look_first(write: Write, target: TargetSpec) -> None:
    """In `eagle_config`, as `llama_eagle3.py` of vLLM and SGLang do."""
    config = {"eagle_config": {"norm_before_fc": True}}
    tensors = {"input_norm.weight": torch.full((3 * 64,), 0.5)}
    read = Read.of(write("modelopt", config=config, tensors=tensors), target)
    assert read.found.spec.name == "eagle3.1"
    assert torch.equal(read.draft.state_dict()["input_norm.weight"], tensors["input_norm.weight"])


def test_one_tap_has_a_layout_of_its_own(
    write: Write, target: TargetSpec, context: ExportContext, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    one = {"fc.weight": torch.randn(64, 64)}
    directory = write("speculators-0.1", config={"eagle_aux_hidden_state_layer_ids": [8]}, tensors=one)
    read = Read.of(directory, target)
    assert (read.algorithm.taps, read.algorithm.layouts) == ((7,), ("speculators",))
    convert(read, "speculators", tmp_path / "again", context, None)
    with pytest.raises(ConfigError, match="SGLang hands a single tap to the layer as it is"):
        convert(read, "plain", tmp_path / "plain", context, None)
    assert not (tmp_path / "plain").exists()


def test_a_draft_of_another_width_has_its_own_embedding(
    write: Write, target: TargetSpec, context: ExportContext, tmp_path: Path, published_drafts: ModuleType
) -> None:
    torch.manual_seed(4)
    small = 32
    tensors: dict[str, Tensor | None] = {}
    for name, tensor in load_file(write("specforge") / "model.safetensors").items():
        shape = [small if size == 64 and place + 1 == tensor.dim() else size for place, size in enumerate(tensor.shape)]
        shape = [2 * small if size == 128 else size for size in shape]
        if name in ("fc.weight", "midlayer.self_attn.o_proj.weight", "midlayer.mlp.down_proj.weight"):
            shape = [small, tensor.shape[1]]
        tensors[name] = torch.randn(shape, dtype=torch.bfloat16) if tensor.is_floating_point() else tensor
    tensors["embed_tokens.weight"] = torch.randn(300, small, dtype=torch.bfloat16)
    directory = tmp_path / "specforge"
    save_file(tensors, directory / "model.safetensors")
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"hidden_size": small, "target_hidden_size": 64}
    path.write_text(json.dumps(config))
    read = Read.of(directory, target)
    for layout in ("plain", "speculators"):
        convert(read, layout, tmp_path / layout, context, None)
        written = load_file(tmp_path / layout / "model.safetensors")
        assert torch.equal(written["embed_tokens.weight"], tensors["embed_tokens.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_draft_without_a_head_has_the_targets(
    write: Write, target: TargetSpec, context: ExportContext, tmp_path: Path, tied: bool
) -> None:
    """As engines give it one: the target's rows at its tokens, or with tied embeddings the embedding's."""
    directory = write("specforge", config={"tie_word_embeddings": tied}, tensors={"lm_head.weight": None})
    ids_N = torch.arange(96) + load_file(directory / "model.safetensors")["d2t"]
    whole_VH = context.head.embedding_VH if tied else context.head.rows(torch.arange(300))
    assert "has no head of its own" in recognise(directory).files.notes[-1]
    convert(Read.of(directory, target), "plain", tmp_path / "plain", context, None)
    written = load_file(tmp_path / "plain" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(written, whole_VH[ids_N].to(torch.bfloat16))


def test_vocabulary_maps_are_offsets_whatever_they_were(write: Write, target: TargetSpec) -> None:
    found = load_file(write("specforge") / "model.safetensors")
    ids_N = found["d2t"] + torch.arange(96)
    read = Read.of(write("angelslim", tensors={"d2t": ids_N}), target)
    assert torch.equal(read.draft.state_dict()["d2t"], found["d2t"])
    assert "`d2t` held the target's tokens, not offsets to them" in read.found.files.notes
    other = found["t2d"].clone()
    other[ids_N[0]] = False
    with pytest.raises(CheckpointError, match="`d2t` and `t2d` say different tokens"):
        Read.of(write("specforge-eagle3.1", tensors={"t2d": other}), target)


def test_biases_of_zero_are_no_biases(write: Write, target: TargetSpec, context: ExportContext, tmp_path: Path) -> None:
    zero = {
        f"midlayer.self_attn.{name}_proj.bias": torch.zeros(size) for name, size in (("q", 64), ("k", 32), ("v", 32))
    }
    directory = write("specforge", config={"attention_bias": True}, tensors=zero)
    convert(Read.of(directory, target), "plain", tmp_path / "plain", context, None)
    assert not [name for name in load_file(tmp_path / "plain" / "model.safetensors") if name.endswith("bias")]


def test_the_widest_of_several_precisions_is_kept(
    write: Write, target: TargetSpec, context: ExportContext, tmp_path: Path
) -> None:
    norm = torch.randn(64)
    read = Read.of(write("specforge", tensors={"norm.weight": norm}), target)
    done = convert(read, "plain", tmp_path / "plain", context, None)
    assert (done.dtype, done.source is not None) == (torch.float32, True)
    assert torch.equal(load_file(tmp_path / "plain" / "model.safetensors")["norm.weight"], norm)
    assert convert(read, "plain", tmp_path / "half", context, torch.bfloat16).dtype == torch.bfloat16


BIAS = {"midlayer.self_attn.k_proj.bias": torch.ones(32)}
FP8 = {
    "midlayer.mlp.up_proj.weight": torch.ones(80, 64).to(torch.float8_e4m3fn),
    "midlayer.mlp.up_proj.weight_scale": torch.ones(1),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "quantised": ("specforge", {"config": {"quantization_config": {"quant_method": "modelopt"}}, "tensors": FP8},
                  r"quantised \(modelopt\): midlayer.mlp.up_proj.weight, midlayer.mlp.up_proj.weight_scale"),
    "biases": ("specforge", {"config": {"attention_bias": True}, "tensors": BIAS},
               "biases that are not zero: midlayer.self_attn.k_proj.bias"),
    "no taps": ("specforge", {"config": {"eagle_config": {"use_aux_hidden_state": False}}},
                "use_aux_hidden_state is false"),
    "two layers": ("specforge", {"config": {"num_hidden_layers": 2}}, "num_hidden_layers is 2"),
    "a window": ("specforge", {"config": {"use_sliding_window": True, "sliding_window": 9}}, "sees 9 positions back"),
    "part of a head turned": ("specforge", {"config": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    "a length that frequencies depend on": (
        "specforge", {"config": {"rope_scaling": {"type": "dynamic", "factor": 2.0}}}, "'dynamic' is not supported"),
    "queries normed": ("specforge", {"tensors": {"midlayer.self_attn.q_norm.weight": torch.ones(16)}},
                       "skip or refuse them: midlayer.self_attn.q_norm.weight"),
    "no mask token": ("z-lab", {"config": {"dflash_config": {"target_layer_ids": [1, 2, 3, 4, 5]}}},
                      "dflash_config.mask_token_id is missing"),
    "latent attention in blocks": ("z-lab", {"config": {"dflash_config": {"attention_mode": "mla"}}},
                                   "its attention is mla"),
    "no layer ids": ("speculators-dflash", {"config": {"aux_hidden_state_layer_ids": None}},
                     "the tapped layers is missing"),
    "no token for masks": ("specforge-peagle", {"config": {"ptd_token_id": None}}, "ptd_token_id is missing"),
    "another embedding": ("angelslim", {"tensors": {"embed_tokens.weight": torch.ones(300, 64)}},
                          "made for another target, or trained its own"),
    "Medusa": ("specforge", {"config": {"architectures": ["MedusaModel"], "medusa_num_heads": 5}}, "Medusa heads"),
    "EAGLE": ("torchspec", {"config": {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": None}},
              "EAGLE, EAGLE-2 or HASS"),
    "DFlash-2": ("z-lab", {"config": {"architectures": ["DFlash2DraftModel"]}}, "a DFlash-2 draft"),
    "a language model": ("specforge", {"config": {"architectures": ["MistralForCausalLM"]}, "tensors": {
        "layers.1.x": torch.ones(1), "embed_tokens.weight": torch.ones(1), "fc.weight": None}},
        "a language model of its own"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_could_not_be_kept_is_named(
    write: Write, target: TargetSpec, kind: str, changes: dict[str, Any], message: str
) -> None:
    if kind == "torchspec":  # an EAGLE draft has no norm of its own for the feature
        directory = write("specforge", **{**changes, "tensors": {"midlayer.hidden_norm.weight": None}})
        tensors = {name.replace("midlayer", "layers.0"): t for name, t in read_tensors(directory)[0].items()}
        save_file(tensors, directory / "model.safetensors")
    else:
        directory = write(kind, **changes)
    with pytest.raises(CheckpointError, match=message):
        Read.of(directory, target)


class Harmful:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", "harm.done"],)


def _nothing(directory: Path) -> None:
    (directory / "pytorch_model.bin").unlink()


def _sharded(directory: Path) -> None:
    _nothing(directory)
    (directory / ".metadata").write_bytes(b"")


def _missing_shard(directory: Path) -> None:
    _nothing(directory)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"fc.weight": "gone.safetensors"}})
    )


def _outside(directory: Path) -> None:
    _nothing(directory)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"fc.weight": "../x.safetensors"}})
    )


def _epochs(directory: Path) -> None:
    _nothing(directory)
    (directory / "epoch_1_step_10").mkdir()
    (directory / "epoch_1_step_10" / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: torch.save({"x": Harmful()}, d / "pytorch_model.bin"), "cannot be read as tensors alone"),
        (lambda d: (d / "pytorch_model.bin").write_bytes(b"x" * 50), "cannot be read as tensors alone"),
        (lambda d: torch.save({"fc.weight": 3}, d / "pytorch_model.bin"), "not tensors: fc.weight"),
        (lambda d: torch.save([1], d / "pytorch_model.bin"), "holds a list"),
        (_nothing, "not an exported draft"),
        (_sharded, "a sharded training checkpoint"),
        (_missing_shard, "1 are not there: gone.safetensors"),
        (_outside, "names files outside its directory"),
        (_epochs, "it holds epoch_1_step_10: name one of these"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    write: Write, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], message: str
) -> None:
    directory = write("eagle")
    monkeypatch.chdir(directory)
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        recognise(directory)
    assert not (directory / "harm.done").exists()


def test_an_engine_that_would_read_something_else_is_noticed(
    write: Write, target: TargetSpec, context: ExportContext, tmp_path: Path
) -> None:
    """The check of the source: had the reader here a setting wrong, nothing would be written."""
    read = Read.of(write("specforge"), target)
    read.draft.get_submodule("midlayer.hidden_norm").weight.data.mul_(2)  # type: ignore[union-attr, operator]
    with pytest.raises(CheckpointError, match="an engine would compute another draft from it"):
        convert(read, "plain", tmp_path / "plain", context, None)
    assert not (tmp_path / "plain").exists()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("CRITICAL"):
        yield
