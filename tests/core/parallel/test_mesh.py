"""A world of one; what several ranks tell each other is in test_agreement (tests/core/training), in real processes."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from torchspec.core import registry, settings
from torchspec.core.parallel import mesh


def test_a_world_of_one_needs_no_launcher_and_can_be_entered_again() -> None:
    for _ in range(2):
        context = mesh.start(registry.load_device("cpu"), settings.launch(), timedelta(seconds=30))
        assert (context.rank, context.world_size, context.is_main) == (0, 1, True)
        assert context.mesh.mesh_dim_names == ("dp", "ring", "ulysses")
        assert context.mesh.device_type == "cpu"
        assert (context.sum([3, 4]), context.max([-1]), context.gather("ü")) == ([3, 4], [-1], ["ü"])
        assert context.broadcast({"a": [1, None]}) == {"a": [1, None]}
        assert context.main_first(lambda: 5) == context.main_only(lambda: 5) == context.agree(lambda: 5) == 5
        mesh.shutdown(context)
        assert not dist.is_initialized()


def test_a_failure_is_raised_as_it_is_where_it_happened() -> None:
    context = mesh.start(registry.load_device("cpu"), settings.launch())
    for run in (context.agree, context.main_only, context.main_first):
        with pytest.raises(ZeroDivisionError):
            run(lambda: 1 // 0)
    mesh.shutdown(context)


def test_a_world_that_the_program_made_stays_its_own() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        made = len(dist.distributed_c10d._world.pg_map)
        for _ in range(3):
            context = mesh.start(registry.load_device("cpu"), settings.launch())
            mesh.shutdown(context)
        assert len(dist.distributed_c10d._world.pg_map) == made
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
    finally:
        dist.destroy_process_group()


def test_a_collective_that_broke_names_the_lost_peer_and_other_errors_pass() -> None:
    broken = "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"
    with pytest.raises(mesh.PeerError, match=r"another rank is gone.*Connection closed"), mesh.lost_peers_named():
        raise RuntimeError(broken)
    with pytest.raises(RuntimeError, match=r"^shapes$"), mesh.lost_peers_named():
        raise RuntimeError("shapes")
