"""Checks of the spec and of `Runtime`."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from torchspec.core.conformance.checks import Check
from torchspec.devices.api import API_VERSION, CAPABILITIES, UnavailableError
from torchspec.devices.conformance.subject import TOLERANCE, Subject, Worst, same

LARGE = 256 << 20


def declared(subject: Subject) -> str:
    spec, device = subject.spec, subject.device
    assert spec.api_version == API_VERSION, f"written for adapter API {spec.api_version}, this is {API_VERSION}"
    unknown = sorted(spec.capabilities - set(CAPABILITIES))
    assert not unknown, f"capabilities {unknown} mean nothing; known are {sorted(CAPABILITIES)}"
    assert device.name == spec.name, f"the device calls itself {device.name!r}, its spec {spec.name!r}"
    types = {spec.device_type, device.runtime.device_type, subject.where.type}
    assert len(types) == 1, f"spec, runtime and bound device name different device types: {sorted(types)}"
    answer = spec.probe()
    assert answer.ok, f"the probe says no ({answer.reason}) although the device was loaded"
    variable = device.runtime.visible_devices_variable
    assert variable is None or variable.isupper(), f"{variable!r} is no name of an environment variable"
    if "ipc" in spec.capabilities:
        assert device.shared_memory is not None, "the capability 'ipc' is declared, but there is no shared_memory"
    return f"{', '.join(sorted(spec.capabilities)) or 'no capabilities'}; {device.runtime.device_count()} visible"


def binding(subject: Subject) -> str:
    runtime = subject.device.runtime
    count = runtime.device_count()
    assert count >= 1, "no device is visible"
    tried = list(range(min(count, 8)))
    for rank in tried:
        where = runtime.bind(rank)
        made = torch.ones(3, device=where)
        assert made.device == where, f"a tensor made on {where} lies on {made.device}"
        assert torch.empty(2, device=subject.spec.device_type).device.index in (None, where.index), (
            f"after bind({rank}) the current device is another"
        )
    assert runtime.bind(0) == subject.where, "bind(0) gives another device the second time"
    return f"ranks {tried[0]} to {tried[-1]}" if len(tried) > 1 else "rank 0"


def arithmetic(subject: Subject) -> str:
    """Every declared dtype multiplies, adds and survives the journey from and to the host."""
    worst = Worst()
    for dtype in (*subject.dtypes,):
        a, b = (torch.randn(48, 64, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2))
        exact = a.to(torch.float64) @ b.to(torch.float64).mT
        here, there = a.to(subject.where), b.to(subject.where)
        worst.compare(f"product, {dtype}", here @ there.mT, exact, TOLERANCE[dtype])
        worst.compare(f"sum, {dtype}", here + there, a.to(torch.float64) + b.to(torch.float64), TOLERANCE[dtype])
        assert same(here, a), f"{dtype} does not come back from the device as it was"
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        values = torch.arange(7).to(dtype)
        assert same(values.to(subject.where), values), f"{dtype} does not come back as it was"
    return f"{len(subject.dtypes)} dtypes, {worst}"


def accounting(subject: Subject) -> str:
    runtime = subject.device.runtime
    gc.collect()
    runtime.reset_peak_memory()
    before = runtime.memory()
    held = torch.ones(LARGE * 5, dtype=torch.uint8, device=subject.where)
    runtime.synchronize()
    during = runtime.memory()
    grown = during.allocated - before.allocated
    assert grown > 4.5 * LARGE, f"{5 * LARGE} bytes were allocated, memory() has seen {grown}"
    assert during.peak >= during.allocated, f"the peak ({during.peak}) is below what is allocated ({during.allocated})"
    assert during.total == 0 or during.total >= during.allocated, "more is allocated than there is"
    del held
    after = runtime.memory()
    assert during.allocated - after.allocated > 4.5 * LARGE, "what was freed still counts as allocated"
    assert after.peak >= 0.95 * during.allocated, "the peak forgets what was freed"
    runtime.reset_peak_memory()
    if subject.where.type != "cpu":  # some kernels cannot reset a process's peak
        assert runtime.memory().peak < during.allocated, "reset_peak_memory() does not reset the peak"
    return f"{grown / 1e6:.0f} MB seen of {5 * LARGE / 1e6:.0f}; total {during.total / 1e9:.1f} GB"


def randomness(subject: Subject) -> str:
    runtime, where = subject.device.runtime, subject.where
    runtime.manual_seed(11)
    state, host = runtime.rng_state(), torch.get_rng_state()
    assert (state.dtype, state.device.type) == (torch.uint8, "cpu"), f"the state is {state.dtype} on {state.device}"
    first, drawn = torch.rand(8, device=where), torch.rand(8)
    second = torch.rand(8, device=where)
    assert not torch.equal(first, second), "the same numbers twice"
    runtime.manual_seed(11)
    assert torch.equal(torch.rand(8, device=where), first), "seeding again gives other numbers"
    runtime.manual_seed(12)
    assert not torch.equal(torch.rand(8, device=where), first), "another seed gives the same numbers"
    runtime.set_rng_state(state)
    torch.set_rng_state(host)
    runtime.set_rng_state(state)
    assert torch.equal(torch.rand(8, device=where), first), "the restored state gives other numbers"
    if where.type != "cpu":
        torch.set_rng_state(host)
        assert torch.equal(torch.rand(8), drawn), "manual_seed() leaves the host's generator alone"
    return f"state of {len(state)} bytes"


def uploading(subject: Subject) -> str:
    runtime, where = subject.device.runtime, subject.where
    dtypes = (*subject.dtypes, torch.int64)
    sent = [torch.arange(n * 1000).remainder(100).to(dtype) for n, dtype in enumerate(dtypes, start=1)]
    waits = [runtime.upload([x.view(-1, 10), x.view(10, -1).mT]) for x in sent]
    product = torch.ones(200, 200, device=where) @ torch.ones(200, 200, device=where)  # work beside the copies
    for host, wait in zip(sent, waits, strict=True):
        whole, turned = wait()
        assert whole.device == turned.device == where, f"the copy lies on {whole.device}, not {where}"
        assert same(whole, host.view(-1, 10)), f"the copy of {host.dtype} differs"
        assert same(turned, host.view(10, -1).mT), f"the copy of a transposed {host.dtype} differs"
    assert float(product[0, 0]) == 200.0
    assert runtime.upload([])() == [], "no tensors give some"
    return f"{2 * len(sent)} tensors beside a product"


def profiling(subject: Subject) -> str:
    with tempfile.TemporaryDirectory() as directory:
        with subject.device.runtime.profile(Path(directory) / "trace"):
            a = torch.ones(64, 64, device=subject.where)
            subject.device.runtime.synchronize()
            (a @ a).cpu()
        files = [path for path in (Path(directory) / "trace").rglob("*") if path.is_file() and path.stat().st_size]
        assert files, "no trace was written"
        return f"{len(files)} file{'s' if len(files) > 1 else ''}, {sum(f.stat().st_size for f in files) / 1e3:.0f} kB"


def uploading_much(subject: Subject) -> str:
    """From another thread, as the trainer does; the sources are dropped, and the copy is used as soon as it may be."""
    values = 16 << 20

    def start(n: int) -> Callable[[], list[Tensor]]:
        return subject.device.runtime.upload([torch.full((values,), float(n)), torch.arange(values).remainder(1000)])

    with ThreadPoolExecutor(1) as thread:
        for n in range(3):
            whole, counted = thread.submit(start, n).result()()
            assert bool((whole == n).all()), "a large copy is not there when it is used"
            assert int(counted[-1]) == (values - 1) % 1000, "the end of a large copy is not there when it is used"
    return f"3 times {values * 12 / 1e6:.0f} MB"


def last_device(subject: Subject) -> str:
    """Random state, memory and uploads are those of the device bound last."""
    runtime = subject.device.runtime
    count = runtime.device_count()
    if count == 1:
        return "the only device is the last"
    last = replace(subject, where=runtime.bind(count - 1))
    try:
        told = [randomness(last), accounting(last), uploading(last)]
    finally:
        runtime.bind(0)
    return f"{last.where}: {told[1]}"


def multiplexing(subject: Subject) -> str:
    service = subject.device.multiplexer
    if service is None:
        return "declared absent"
    answer = service.available()
    if not answer.ok:
        assert answer.reason, "it is not available, and does not say why"
        return f"not available here: {answer.reason}"
    with tempfile.TemporaryDirectory() as directory:
        stop = service.start(Path(directory))
        try:
            variables = dict(service.environment(Path(directory)))
            assert variables, "processes cannot find it: no variables"
        finally:
            stop()
    return f"started and stopped; {', '.join(sorted(variables))}"


def limiting(subject: Subject) -> str:
    """Last of all that runs in this process: the limit stays."""
    runtime = subject.device.runtime
    if "ranks_share_device" in subject.spec.capabilities:
        return "declared absent: ranks share this device, its memory is not divided"
    total = runtime.memory().total
    if not total:
        return "declared absent: the device cannot say how much memory it has"
    try:
        runtime.limit_memory(0.05)
    except UnavailableError as absent:
        return f"declared absent: {absent}"
    within = torch.empty(int(total * 0.02), dtype=torch.uint8, device=subject.where)
    del within
    try:
        held = torch.empty(int(total * 0.2), dtype=torch.uint8, device=subject.where)
    except (RuntimeError, MemoryError) as refused:
        return f"refused at 20 % with a limit of 5 %: {type(refused).__name__}"
    finally:
        runtime.limit_memory(1.0)
    raise AssertionError(f"{held.numel()} bytes were given with a limit of 5 % of {total}")


RUNTIME = (
    Check("spec: what is declared", declared),
    Check("runtime: binding", binding),
    Check("runtime: dtypes", arithmetic),
    Check("runtime: random state", randomness),
    Check("runtime: memory accounting", accounting),
    Check("runtime: uploads beside work", uploading),
    Check("runtime: large uploads from a thread", uploading_much),
    Check("runtime: the last device", last_device),
    Check("runtime: a profile", profiling),
    Check("runtime: several processes at a time", multiplexing),
)
LIMITS = (Check("runtime: a limit of memory", limiting),)
