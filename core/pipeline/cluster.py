"""`pipeline.topology=disaggregated`: the driver, which places engines and ranks on a Ray cluster and watches them.

Nothing of the data passes through it, nor through Ray: ranks ask engines over HTTP and take features out of a store,
gradients go over torch.distributed. An engine that dies is started again where it was, or by Ray elsewhere; when a rank
dies all ranks start again from the newest checkpoint, while the engines stay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from torchspec.core import registry, settings
from torchspec.core.config.schema import RunConfig
from torchspec.core.errors import TorchspecError, UnavailableError
from torchspec.core.features.mooncake import MooncakeSettings
from torchspec.core.pipeline import run_dir
from torchspec.core.pipeline.cluster_agents import EngineAgent, RankAgent, own_address
from torchspec.core.pipeline.engine_setup import ENGINE
from torchspec.core.pipeline.launch import LOOPBACK, PEER_SECONDS, SHUTDOWN_SECONDS, torchspec_command
from torchspec.core.pipeline.mooncake_master import MooncakeMaster
from torchspec.core.pipeline.topology_fit import choose_store, engines_in_all, trainers_in_all
from torchspec.core.training.checkpoint_files import steps_on_disk

logger = logging.getLogger(__name__)

LOGS = "logs"
POLL_SECONDS = 0.5
ANSWER_SECONDS = 30.0
"""For an actor's answer, which it gives at once: after it, the actor counts as gone."""
BETWEEN_WORDS = 15.0
FAILURES_OF_ENGINES = 3


class ClusterError(TorchspecError):
    """The cluster has no room, or lost what it was running."""


Say = Callable[[str], None]


def run(config: RunConfig, words: Sequence[str], say: Say) -> int:
    """Train on the cluster; -> the exit code. `words` are those of the command, which every rank gets too."""
    try:
        import ray
    except ImportError as error:
        raise UnavailableError(
            f"pipeline.topology=disaggregated needs Ray: {error}\n    remedy: pip install 'torchspec[ray]'"
        ) from error
    engines, trainers = engines_in_all(config), trainers_in_all(config)
    device = registry.choose_device(config.device, settings.default_device())[0]
    run_dir.open_run(config).lock.close()  # another run's engines must stay; rank 0 takes the lock for good
    say(f"starting Ray for {engines} engine(s) and {trainers} rank(s)")
    shutil.rmtree(config.output / ENGINE, ignore_errors=True)
    alone = config.ray.address is None
    _connect(ray, config, engines, trainers)
    try:
        host = LOOPBACK if alone else own_address()
        with contextlib.ExitStack() as stack:
            delivery = _delivery(config, device, host, stack)
            driver = stack.enter_context(Driver(ray, config, device, words, host, delivery, say))
            return driver.run()
    finally:
        ray.shutdown()


def _delivery(config: RunConfig, device: str, host: str, stack: contextlib.ExitStack) -> dict[str, Any]:
    """How features come to the ranks: see `core.workers.delivery`. A Mooncake master that nobody runs is started."""
    loaded = registry.load_device(device)
    store = choose_store(config, loaded, registry.backends().spec(config.backend))
    if store != "mooncake":
        return {"kind": store}
    given = config.mooncake
    if given.master is None:
        master = stack.enter_context(MooncakeMaster(config.output / LOGS, host=host)).settings
    else:
        master = MooncakeSettings(master=given.master)
    wanted = replace(master, protocol=given.protocol, rdma_devices=given.rdma_devices)
    return {"kind": store, "namespace": f"torchspec-{secrets.token_hex(4)}", "settings": asdict(wanted)}


def _connect(ray: Any, config: RunConfig, engines: int, trainers: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "torchspec"}
    if config.ray.address is None:
        # Of a machine of one's own the cores are not counted: a laptop may run more processes than it has.
        need = engines * config.engine.tensor_parallel * config.ray.cpus_per_engine
        need += trainers * config.ray.cpus_per_trainer
        options |= of_its_own(cpus=max(settings.cores(), int(need) + 1))
    else:
        options["address"] = config.ray.address
    try:
        ray.init(**options)
    except Exception as error:  # Ray fails in many ways, each for the user to read
        how = f"reached at {config.ray.address}" if config.ray.address else "started on this machine"
        raise ClusterError(f"Ray cannot be {how}: {error}") from error


def of_its_own(*, cpus: int) -> dict[str, Any]:
    """What `ray.init` is told of a cluster of this machine alone, for one run."""
    options: dict[str, Any] = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    options["_system_config"] = {"worker_niceness": 0}  # what runs below its actors is the run itself
    return options


@dataclass
class _Rank:
    number: int
    actor: Any
    code: int | None = None


@dataclass
class Driver:
    """Of one run, on a cluster that is there."""

    ray: Any
    config: RunConfig
    device: str
    words: Sequence[str]
    host: str
    delivery: dict[str, Any]
    say: Say
    _received: list[int] = field(default_factory=list)
    _group: Any = None
    _engines: list[Any] = field(default_factory=list)
    _ranks: list[_Rank] = field(default_factory=list)
    _store: Any = None
    _shown: int = 0

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_ranks()
        for engine in self._engines:
            with contextlib.suppress(Exception):
                self.ray.get(engine.close.remote(), timeout=ANSWER_SECONDS)
            with contextlib.suppress(Exception):
                self.ray.kill(engine)
        if self._group is not None:
            with contextlib.suppress(Exception):
                self.ray.util.remove_placement_group(self._group)

    def run(self) -> int:
        self._place()
        left, reached = self.config.ray.restarts, self._newest()
        log = self.config.output / LOGS / "rank-0.log"
        self._shown = log.stat().st_size if log.exists() else 0
        with self._forwarding():
            while True:
                self._start_ranks()
                code = self._wait()
                if code == 0 or self._received or not self._lost():
                    return code
                if self._newest() > reached:
                    left, reached = self.config.ray.restarts, self._newest()
                if left == 0:
                    raise ClusterError(
                        f"a rank died once more ({self._cause()}), {self.config.ray.restarts} times without a new "
                        f"checkpoint (ray.restarts): its log is in {self.config.output / LOGS}"
                    )
                left -= 1
                where = f"from the checkpoint of step {reached}" if reached else "from the beginning"
                self.say(f"{self._cause()}: all ranks start again {where}; the engines stay")
                self._end_ranks()

    def _newest(self) -> int:
        steps = steps_on_disk(self.config.output / run_dir.CHECKPOINTS)
        return steps[-1] if steps else 0

    def _resources(self, devices: int, cpus: float) -> dict[str, float]:
        """Of one process, in Ray's words."""
        name = self.config.ray.resource or registry.load_device(self.device).runtime.ray_resource
        found: dict[str, float] = {"CPU": cpus}
        if name is not None and name != "CPU":
            found[name] = devices
        return found

    def _place(self) -> None:
        """Room for everything at once, then the engines."""
        size = self.config.engine.tensor_parallel
        wants = [self._resources(size, size * self.config.ray.cpus_per_engine)] * engines_in_all(self.config)
        wants += [self._resources(1, self.config.ray.cpus_per_trainer)] * trainers_in_all(self.config)
        self._group = self.ray.util.placement_group([w if any(w.values()) else {"CPU": 0.01} for w in wants], "PACK")
        self._await_room(wants)
        remote = self.ray.remote(EngineAgent)
        values = self.config.model_dump(mode="json")
        listen = LOOPBACK if self.config.ray.address is None else ""
        for number in range(engines_in_all(self.config)):
            options = self._placed(wants[number], number)
            actor = remote.options(max_restarts=-1, max_task_retries=0, max_concurrency=4, **options)
            self._engines.append(actor.remote(values, self.device, number, listen, self.delivery, settings.handed_on()))

    def _await_room(self, wants: Sequence[Mapping[str, float]]) -> None:
        ready, start, seconds = self._group.ready(), time.monotonic(), self.config.ray.start_timeout
        while not self.ray.wait([ready], timeout=min(BETWEEN_WORDS, seconds))[0]:
            passed = time.monotonic() - start
            total = {name: sum(want.get(name, 0) for want in wants) for want in wants for name in want}
            there = {name: count for name, count in self.ray.cluster_resources().items() if name in total}
            if passed > seconds:
                raise ClusterError(
                    f"the cluster had no room for the run within {seconds:.0f} s (ray.start_timeout): it needs {total} "
                    f"and has {there} in all"
                )
            self.say(f"waiting for room on the cluster, {passed:.0f} s of at most {seconds:.0f} s: {total} of {there}")

    def _placed(self, want: Mapping[str, float], bundle: int) -> dict[str, Any]:
        """Options of an actor in this bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        special = {name: count for name, count in want.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": want["CPU"],
            "num_gpus": want.get("GPU", 0),
            "resources": special,
            "scheduling_strategy": strategy,
            "enable_task_events": False,  # Ray's head keeps one for each of the driver's looks
        }

    def _start_ranks(self) -> None:
        world, first = trainers_in_all(self.config), engines_in_all(self.config)
        want = self._resources(1, self.config.ray.cpus_per_trainer)
        # A store of its own for every start: what the last ranks agreed on there is no more true.
        self._store = TCPStore(self.host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=10))
        remote = self.ray.remote(RankAgent)
        self._ranks = []
        for number in range(world):
            actor = remote.options(max_restarts=0, max_concurrency=4, **self._placed(want, first + number)).remote()
            place = {"rank": number, "world_size": world, "address": self.host, "port": self._store.port}
            command = json.dumps(settings.typed_command())
            environment = {**settings.handed_on(), "TORCHSPEC_COMMAND": command}
            log = str(self.config.output / LOGS / f"rank-{number}.log")
            rank = _Rank(number=number, actor=actor)
            self._ranks.append(rank)
            if number == 0:
                metrics = str(self.config.output / run_dir.METRICS)
                self._ask(actor.export, metrics, self.config.output.name, seconds=120)
            self._ask(actor.start, torchspec_command(["train", *self.words]), environment, place, log, seconds=120)

    def _wait(self) -> int:
        """Until all ranks have ended; -> the exit code."""
        deadline: float | None = None
        signalled = False
        while True:
            for rank in self._ranks:
                if rank.code is None:
                    rank.code = self._code(rank)
            self._follow()
            codes = [rank.code for rank in self._ranks]
            failed = next((code for code in codes if code), None)
            if all(code is not None for code in codes):
                cause = min((code for code in codes if code), default=0)
                return cause if cause >= 0 else 128 - cause
            now = time.monotonic()
            if failed is not None and deadline is None:
                deadline = now + PEER_SECONDS
                self._send(signal.SIGTERM)
            if self._received and not signalled:
                signalled, deadline = True, now + SHUTDOWN_SECONDS
                self._send(self._received[0])
            if len(self._received) > 1 or (deadline is not None and now > deadline):
                self._end_ranks(keep=True)
            self._check_engines()
            time.sleep(POLL_SECONDS)

    def _code(self, rank: _Rank) -> int | None:
        try:
            code: int | None = self._ask(rank.actor.code)
        except Exception as error:  # the actor's process or its node is gone, and the rank with it  # noqa: BLE001
            logger.warning("rank %d: its place on the cluster was lost (%s)", rank.number, type(error).__name__)
            return -signal.SIGKILL
        return code

    def _check_engines(self) -> None:
        """ClusterError when one cannot be started; one that died is started again by its supervisor or by Ray."""
        for number, engine in enumerate(self._engines):
            try:
                state, why = self._ask(engine.state)
            except Exception:  # it is being started again, or Ray will say so at the next look  # noqa: BLE001
                continue
            if state == "failed":
                self._send(signal.SIGTERM)
                raise ClusterError(f"engine {number}: {why}")

    def _lost(self) -> bool:
        """A rank was killed; the others then found it gone."""
        return any(rank.code is not None and rank.code < 0 for rank in self._ranks)

    def _cause(self) -> str:
        rank = next(rank for rank in self._ranks if rank.code is not None and rank.code < 0)
        assert rank.code is not None
        name = signal.Signals(-rank.code).name if -rank.code in set(signal.Signals) else str(-rank.code)
        return f"rank {rank.number} was killed by {name}"

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.code is None:
                with contextlib.suppress(Exception):
                    self._ask(rank.actor.send, number)

    def _end_ranks(self, *, keep: bool = False) -> None:
        """Whatever of them still runs. `keep`: their agents, which are to be asked once more."""
        for rank in self._ranks:
            with contextlib.suppress(Exception):
                self._ask(rank.actor.end)
            if not keep:
                with contextlib.suppress(Exception):
                    self.ray.kill(rank.actor)
        if not keep:
            self._ranks = []

    def _ask(self, method: Any, *values: Any, seconds: float = ANSWER_SECONDS) -> Any:
        return self.ray.get(method.remote(*values), timeout=seconds)

    def _follow(self) -> None:
        """Say what rank 0 has said since."""
        path: Path = self.config.output / LOGS / "rank-0.log"
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(self._shown)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._shown += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                self.say(line)

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Note signals: the first goes to every rank, which ends its step and writes a checkpoint."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._received.append(number)

        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
