"""The only place that reads environment variables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchspec.core.errors import UnavailableError

_LEAST_SECRET = 6


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where this process stands among those started by torchrun, or alone."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1


def launch() -> Launch:
    """torchrun's RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; a world of one without a launcher."""
    return Launch(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def default_device() -> str | None:
    """`TORCHSPEC_DEVICE`: the device used when none is configured."""
    return os.environ.get("TORCHSPEC_DEVICE") or None


def attention_kernels() -> tuple[str, ...]:
    """`TORCHSPEC_ATTENTION`: the only attention kernels that a device with several may use, best first, by commas."""
    return tuple(name for each in os.environ.get("TORCHSPEC_ATTENTION", "").split(",") if (name := each.strip()))


def cores() -> int:
    """Processor cores that this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir() -> Path:
    """`TORCHSPEC_CACHE`, else `$XDG_CACHE_HOME/torchspec`, else `~/.cache/torchspec`."""
    named = os.environ.get("TORCHSPEC_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "torchspec"


def engines_dir() -> Path:
    """`TORCHSPEC_ENGINES`, else `$XDG_DATA_HOME/torchspec/engines`, else `~/.local/share/torchspec/engines`."""
    named = os.environ.get("TORCHSPEC_ENGINES")
    if named:
        return Path(named)
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "torchspec" / "engines"


def malloc_is_tuned() -> bool:
    """Whether the user gave glibc's malloc thresholds of their own (mallopt(3))."""
    return any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"))


def typed_command() -> list[str]:
    """The words the user typed: this process's own, or those of the process that started it as a rank."""
    handed_on = os.environ.get("TORCHSPEC_COMMAND")
    return list(json.loads(handed_on)) if handed_on else list(sys.argv)


def launcher() -> int | None:
    """The process id of the `--nproc` launcher that started this rank."""
    number = os.environ.get("TORCHSPEC_LAUNCHER", "")
    return int(number) if number.isdecimal() else None


def started_here() -> list[str]:
    """`NAME=VALUE` by which a process started from here knows whose it is (`launcher`)."""
    return [f"TORCHSPEC_LAUNCHER={os.getpid()}"]


def rank_environment(*, rank: int, world_size: int, address: str, port: int) -> dict[str, str]:
    """This process's environment for a rank it starts on this machine: what torchrun would set.

    The starting process serves the rendezvous store at `address:port` (torch's agent store). Threads are shared out
    among the ranks unless the user has chosen a number.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, cores() // world_size)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHSPEC_COMMAND": json.dumps(sys.argv),
        "TORCHSPEC_LAUNCHER": str(os.getpid()),
    }


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for one that it starts, with these variables."""
    return {**os.environ, **variables}


def is_set(variable: str) -> bool:
    """Whether the user gave this variable, of somebody else's, a value."""
    return bool(os.environ.get(variable))


def plain_output() -> bool:
    """Whether progress is to be plain lines on a terminal, too: NO_COLOR, CI, or a TERM that moves no cursor."""
    return is_set("NO_COLOR") or is_set("CI") or os.environ.get("TERM", "dumb") in ("", "dumb")


def value_of(variable: str) -> str | None:
    """The value that the user gave this variable, of somebody else's; None for none."""
    return os.environ.get(variable) or None


def values_named(wanted: Callable[[str], bool]) -> list[str]:
    """Values of the variables with such names, the longest first; none so short that it would be in any text."""
    found = {value for name, value in os.environ.items() if wanted(name) and len(value) >= _LEAST_SECRET}
    return sorted(found, key=len, reverse=True)


def handed_on(names: Sequence[str] = ("OMP_NUM_THREADS",)) -> dict[str, str]:
    """Variables of this process that hold for those it has started elsewhere."""
    return {name: os.environ[name] for name in names if name in os.environ}


def take_on(variables: Mapping[str, str]) -> None:
    """What another process handed on: it holds for this one and those it starts."""
    os.environ.update(variables)


def host_name() -> str:
    """This machine's."""
    return os.uname().nodename


def engine_token() -> str:
    """`TORCHSPEC_ENGINE_TOKEN`, by which an engine's worker knows its clients; "" if there is none."""
    return os.environ.get("TORCHSPEC_ENGINE_TOKEN", "")


def set_defaults(variables: Mapping[str, str]) -> None:
    """For this process and those it starts, in which the user's own values go before."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def give_orders(text: str) -> None:
    """`TORCHSPEC_ORDERS`: for our plug-in in processes that an engine starts from here."""
    os.environ["TORCHSPEC_ORDERS"] = text


def orders() -> str | None:
    """What `give_orders` said in the process that started this one."""
    return os.environ.get("TORCHSPEC_ORDERS")


def engine_environment(*, folders: Sequence[Path]) -> dict[str, str]:
    """This process's environment for an engine's worker: `folders` go first on PYTHONPATH.

    What a launcher told this rank is left out: an engine with ranks of its own would take it for its own.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path)}


def visible_devices(variable: str, devices: Sequence[int]) -> str:
    """`variable`'s value for a process that is to see these of the accelerators that this one does."""
    mine = [name for name in os.environ.get(variable, "").split(",") if name]
    hidden = [each for each in devices if mine and each >= len(mine)]
    if hidden:
        raise UnavailableError(
            f"{variable}={os.environ[variable]} shows {len(mine)} accelerators, and an engine needs those of numbers "
            f"{', '.join(map(str, devices))}: show more, or ask for fewer engines"
        )
    return ",".join(mine[each] if mine else str(each) for each in devices)


_OF_A_RANK = frozenset(
    {
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
        "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "TORCHSPEC_ENGINE_TOKEN",
    }
)  # fmt: skip
