"""A conformance run as people see it: progress, a table with figures, what failed in detail, and a verdict."""

from __future__ import annotations

import json
import platform
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from importlib import metadata
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from torchspec.cli.console import ProgressDisplay, announce, print_table
from torchspec.core.errors import ConfigError

if TYPE_CHECKING:
    from torchspec.cli.schemas import EngineFlags
    from torchspec.core.conformance.checks import Check, Result
    from torchspec.core.registry import Registry

DEVICE = "device"
BACKEND = "backend"
START_SECONDS = {"torchspec.devices.conformance": 180.0, "torchspec.backends.conformance": 900.0}
"""How long the process of a suite may take to its first check."""


def device_words(field: str, name: str) -> list[str]:
    """For the process that checks this device; ConfigError about `field` where it cannot be used here."""
    from torchspec.core import registry
    from torchspec.core.config import environment

    if problems := environment.adapter_problems(field, name, registry.devices()):
        raise ConfigError(problems)
    return [name]


def engine_words(options: EngineFlags) -> list[str]:
    """For the process that checks `options.backend`; ConfigError with everything that cannot work."""
    from torchspec.backends.conformance import Setting
    from torchspec.cli.target import check
    from torchspec.core import registry, settings
    from torchspec.core.models.target_spec import resolve_target

    check(options, "capture")
    setting = Setting(
        name=options.backend,
        target=str(resolve_target(options.target)),
        device=registry.choose_device(options.device, settings.default_device())[0],
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        process=options.engine_config().model_dump(exclude_unset=True, mode="json"),
    )
    return [setting.to_json()]


class ConformanceDisplay(ProgressDisplay):
    """With the name of the check that is being made."""

    def __init__(self) -> None:
        super().__init__()
        self.check = ""

    def _current(self, stage: str) -> str:
        return self.check


def run_conformance(
    kind: str, name: str, checks: Sequence[Check[Any]], words: Sequence[str], topics: Sequence[str], *, as_json: bool
) -> int:
    """Exit code 0 if no check failed. `words` are for the process that makes the checks, which SIGTERM ends, too."""
    from torchspec.core import registry
    from torchspec.core.conformance.apart import run_apart

    known: Registry[Any] = registry.devices() if kind == DEVICE else registry.backends()
    chosen = [check for check in checks if not topics or check.name.partition(":")[0] in topics]
    announce(f"putting {kind} {name} through {len(chosen)} checks")
    module = f"torchspec.{kind}s.conformance"
    results: list[Result] = []
    began = time.monotonic()
    display = ConformanceDisplay()
    with display, _sigterm_leaves():

        def starts(check: str) -> None:
            display.check = check
            display("conformance", len(results), len(chosen))

        with closing(run_apart(module, words, chosen, start_seconds=START_SECONDS[module], progress=starts)) as coming:
            results.extend(coming)
        display("conformance", len(results), len(chosen))
    facts = {
        **_facts(kind, name, known),
        "seconds": round(time.monotonic() - began, 1),
        "topics": list(topics),
        "verdict": verdict(kind, name, results, part=len(chosen) < len(checks)),
        "checks": [asdict(result) for result in results],
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts, results)
    return 1 if any(result.status == "FAIL" for result in results) else 0


@contextmanager
def _sigterm_leaves() -> Iterator[None]:
    """SIGTERM leaves the block as an exception does, through everything that ends what was started."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def verdict(kind: str, name: str, results: Sequence[Result], *, part: bool) -> str:
    """One sentence: conforms, conforms as far as it was checked, or does not conform."""
    count = Counter(result.status for result in results)
    made = f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped"
    if count["FAIL"]:
        return f"{kind} {name} DOES NOT CONFORM ({made})"
    if count["SKIP"] or part:
        left = "only some topics were checked; " if part else ""
        return f"{kind} {name} CONFORMS AS FAR AS IT WAS CHECKED ({left}{made})"
    return f"{kind} {name} CONFORMS ({made})"


def _facts(kind: str, name: str, known: Registry[Any]) -> dict[str, Any]:
    from torchspec.core import registry
    from torchspec.core.interfaces.device import API_VERSION

    (entry,) = known.entries[name]
    version = entry.dist.version if entry.dist is not None else "of unknown version"
    return {
        kind: name,
        "registered_by": f"{registry.distribution(entry)} {version} ({entry.value})",
        "adapter_api": API_VERSION,
        "torchspec": metadata.version("torchspec"),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _show(facts: dict[str, Any], results: Sequence[Result]) -> None:
    print(f"torchspec {facts['torchspec']}, adapter API {facts['adapter_api']}, torch {facts['torch']}", end=", ")
    print(f"Python {facts['python']}, {facts['platform']}")
    print(f"registered by {facts['registered_by']}")
    print()
    rows = [
        (result.check, result.status, f"{result.seconds:.1f}", escape(result.text if result.status != "FAIL" else ""))
        for result in results
    ]
    print_table("conformance", ("check", "result", "seconds", "what was measured, or missing"), rows, figures=False)
    for result in results:
        if result.status == "FAIL":
            print(f"\nFAIL {result.check}\n    {result.text}")
            for line in result.where.splitlines():
                print(f"    | {line}")
    print(f"\n{facts['verdict']} in {facts['seconds']:.0f} s")
