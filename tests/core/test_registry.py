"""Names found through real entry points of distributions on the path: nothing is mocked, only installed."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torchspec.core import registry
from torchspec.core.errors import ConfigError, UnavailableError
from torchspec.core.interfaces.device import API_VERSION, DeviceSpec

Install = Callable[..., None]

SPEC = """
from torchspec.devices.api import Availability, DeviceSpec
def load():
    raise SystemExit("loaded")
SPEC = DeviceSpec(name={name!r}, device_type="cpu", probe=lambda: {probe}, load=load, api_version={version})
"""
READY = "Availability(ok=True)"
ABSENT = "Availability(ok=False, reason='no such chip', hint='solder one')"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(distribution, device name, module source): a distribution with one entry point, on the path."""

    def put(distribution: str, name: str, source: str, attribute: str = "SPEC") -> None:
        root = tmp_path / distribution
        info = root / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        module = f"{distribution}_module"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[torchspec.devices]\n{name} = {module}:{attribute}\n")
        (root / f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(root)
        modules.append(module)
        registry.devices.cache_clear()

    modules: list[str] = []
    yield put
    registry.devices.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


def spec_source(name: str, probe: str = READY, version: int = API_VERSION) -> str:
    return SPEC.format(name=name, probe=probe, version=version)


def test_built_ins_come_through_entry_points() -> None:
    assert {"cpu", "cuda", "npu"} <= set(registry.devices().names())
    assert {"hf", "sglang", "vllm"} <= set(registry.backends().names())
    assert "eagle3" in registry.algorithms().names()


def test_a_plug_in_is_found_and_loaded_like_a_built_in(install: Install) -> None:
    install("toy_dist", "toy", spec_source("toy"))
    assert "toy" in registry.devices().names()
    assert registry.devices().spec("toy").device_type == "cpu"
    with pytest.raises(SystemExit, match="loaded"):
        registry.load_device("toy")


def test_nothing_is_imported_before_a_name_is_asked_for(install: Install) -> None:
    install("bomb_dist", "bomb", "raise SystemExit('imported')")
    assert "bomb" in registry.devices().names()
    assert registry.load_device("cpu").name == "cpu"


def test_an_unknown_name_lists_the_choices_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        registry.load_device("cdua")
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("device", "cdua")
    assert {"cpu", "cuda", "npu"} <= set(problem.choices)
    assert problem.remedy == "did you mean cuda?"
    for far in ("abacus", "gpu"):
        with pytest.raises(ConfigError, match="`torchspec doctor` lists every device"):
            registry.load_device(far)


def test_one_name_from_two_distributions_names_both(install: Install) -> None:
    install("first_dist", "toy", spec_source("toy"))
    install("second_dist", "toy", spec_source("toy"))
    assert "toy" in registry.devices().names()
    with pytest.raises(UnavailableError, match="device 'toy' is registered by more than one") as caught:
        registry.load_device("toy")
    assert "first_dist (first_dist_module:SPEC)" in str(caught.value)
    assert "second_dist (second_dist_module:SPEC)" in str(caught.value)


def test_a_built_in_cannot_be_shadowed(install: Install) -> None:
    install("shadow_dist", "cpu", spec_source("cpu"))
    with pytest.raises(UnavailableError, match=r"torchspec.*shadow_dist|shadow_dist.*torchspec"):
        registry.load_device("cpu")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_vendor_library", "ModuleNotFoundError: No module named 'no_such_vendor_library'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("other = 1", "AttributeError"),
        ("SPEC = 'not a spec'", "is a str, not a DeviceSpec"),
        (spec_source("toy", version=API_VERSION + 1), f"adapter API {API_VERSION + 1}, this torchspec speaks"),
        (spec_source("tony"), "calls itself 'tony'"),
    ],
)
def test_a_broken_plug_in_is_named_with_its_cause(install: Install, source: str, message: str) -> None:
    install("toy_dist", "toy", source)
    with pytest.raises(UnavailableError) as caught:
        registry.load_device("toy")
    assert "device 'toy' (toy_dist, toy_dist_module:SPEC)" in str(caught.value)
    assert message in str(caught.value)


def test_an_absent_device_says_why_and_what_to_do(install: Install) -> None:
    install("toy_dist", "toy", spec_source("toy", ABSENT))
    with pytest.raises(UnavailableError) as caught:
        registry.load_device("toy")
    assert str(caught.value) == "device 'toy' is not available here: no such chip\n    remedy: solder one"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("probe", "cause"), [("1 / 0", "ZeroDivisionError"), ("exit(3)", "SystemExit: 3")])
def test_a_probe_that_fails_is_an_answer(install: Install, probe: str, cause: str) -> None:
    install("toy_dist", "toy", spec_source("toy", probe))
    with pytest.raises(UnavailableError, match=f"'toy' is not available here: its probe failed with {cause}"):
        registry.load_device("toy")


@pytest.fixture
def no_accelerator() -> None:
    found = [name for name in registry.devices().names() if name != "cpu" and registry.devices().spec(name).probe().ok]
    if found:
        pytest.skip(f"this machine has {found}")


def test_configuration_comes_before_the_environment_and_both_before_probing(install: Install) -> None:
    install("toy_dist", "toy", spec_source("toy"))
    assert registry.choose_device("cuda", "npu") == ("cuda", "configuration")
    assert registry.choose_device(None, "npu") == ("npu", "TORCHSPEC_DEVICE")


@pytest.mark.usefixtures("no_accelerator")
def test_the_one_accelerator_is_chosen_and_else_the_cpu(install: Install) -> None:
    assert registry.choose_device(None, None) == ("cpu", "no accelerator found")
    install("absent_dist", "absent", spec_source("absent", ABSENT))
    assert registry.choose_device(None, None) == ("cpu", "no accelerator found")
    install("toy_dist", "toy", spec_source("toy"))
    assert registry.choose_device(None, None) == ("toy", "the only accelerator found")


@pytest.mark.usefixtures("no_accelerator")
def test_two_accelerators_are_the_users_choice(install: Install) -> None:
    install("toy_dist", "toy", spec_source("toy"))
    install("play_dist", "play", spec_source("play"))
    with pytest.raises(ConfigError, match="name one with --device") as caught:
        registry.choose_device(None, None)
    assert caught.value.problems[0].choices == ("play", "toy")


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("fault", ["import no_such_vendor_library", "raise SystemExit(3)"])
def test_a_broken_plug_in_nobody_asked_for_is_a_warning(
    install: Install, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    install("toy_dist", "toy", fault)
    with caplog.at_level(logging.WARNING):
        assert registry.choose_device(None, None) == ("cpu", "no accelerator found")
    assert "device 'toy' (toy_dist, toy_dist_module:SPEC) cannot be loaded" in caplog.text


def test_specs_are_of_the_registrys_type() -> None:
    assert isinstance(registry.devices().spec("cpu"), DeviceSpec)
