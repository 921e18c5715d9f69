"""Checks of the spec, of `describe`, of closing, and of what an engine says when it cannot start."""

from __future__ import annotations

from dataclasses import fields, replace

from torchspec.backends.api import API_VERSION, ENGINE_CAPABILITIES, TorchspecError
from torchspec.backends.conformance.capture import START
from torchspec.backends.conformance.subject import Subject
from torchspec.core import registry
from torchspec.core.conformance.checks import Check, NotHereError
from torchspec.core.models.target_quantisation import described as in_words

UNCHECKED = ("serve", "parts", "streamed", "tensor_mesh")
"""What the interface has and no check tries: it takes a draft, several callers, or several ranks."""


def declared(subject: Subject) -> str:
    spec = subject.spec
    assert spec.api_version == API_VERSION, f"written for adapter API {spec.api_version}, this is {API_VERSION}"
    unknown = sorted(spec.capabilities - set(ENGINE_CAPABILITIES))
    assert not unknown, f"capabilities {unknown} mean nothing; known are {sorted(ENGINE_CAPABILITIES)}"
    assert {"capture", "generate"} <= spec.capabilities, "every engine captures and generates"
    assert ("serve" in spec.capabilities) == (spec.serve is not None), "'serve' is declared without `serve`, or not"
    assert (spec.start is None) == (spec.attach is None), "an engine has both `start` and `attach`, or neither"
    answer = spec.probe()
    assert answer.ok or (answer.reason and answer.hint), "the probe says no without a reason or a hint"
    return f"{', '.join(sorted(spec.capabilities))}; not checked here: {', '.join(UNCHECKED)}"


def described(subject: Subject) -> str:
    """The facts that trainers and exporters need, as the target's own files have them."""
    told, wanted = subject.capturing.describe(), subject.target
    for each in fields(wanted):
        mine, theirs = getattr(told, each.name), getattr(wanted, each.name)
        assert mine == theirs, f"{each.name} is {mine!r}; the target's files say {theirs!r}"
    quantised = "" if wanted.quantisation is None else f", quantised: {in_words(wanted.quantisation)}"
    return f"{wanted.architecture}, {wanted.num_layers} layers, hidden {wanted.hidden_size}{quantised}"


def unstartable(subject: Subject) -> str:
    """A target that is not there: an error for people, in time, and nothing left running."""
    if subject.setting.process.get("url") is not None:
        raise NotHereError("attached to a running engine, which has its target")
    subject.close()
    options = replace(subject.options(subject.taps, {}), target=subject.path / "nothing-here")
    try:
        engine = registry.load_engine(subject.setting.name, options)
    except TorchspecError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    engine.close()
    raise AssertionError("an engine started without a target")


def closing(subject: Subject) -> str:
    """Twice is fine, and a closed engine says that it is closed."""
    engine = subject.engine()
    engine.close()
    engine.close()
    try:
        engine.generate([subject.tokens(4, 1)], max_new_tokens=1)
    except (RuntimeError, TorchspecError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    finally:
        subject.close()
    raise AssertionError("a closed engine writes text")


FACTS = (Check("spec: what is declared", declared), Check("target: described as its files do", described, START))
ENDS = (
    Check("errors: a closed engine", closing, START),
    Check("errors: a target that is not there", unstartable, START),
)
