"""A Ray cluster of two nodes that examples/launch/ray/node.sh starts, and a training on it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

pytest.importorskip("ray", reason='pip install "torchspec[ray]"')
LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch"
NODE = LAUNCH / "ray" / "node.sh"


@pytest.mark.slow
def test_a_training_on_two_nodes(tiny_target: Path, tmp_path: Path, launching: ModuleType) -> None:
    """No node has room for both: the engine is on one, the rank on the other."""
    port = str(launching.free_port(30000, 32000))
    address = f"127.0.0.1:{port}"
    variables = launching.environment(HOME=str(tmp_path), RAY_PORT=port, RAY_AUTH_MODE="token")
    variables.pop("RAY_AUTH_TOKEN_PATH", None)
    log = tmp_path / "nodes.log"
    one = ("--num-cpus=1", "--num-gpus=0")
    nodes = [launching.start([NODE, "head", *one], log, variables)]
    try:
        health = ["ray", "health-check", "--address", address]
        launching.wait_for(
            lambda: subprocess.run(health, env=variables, capture_output=True, check=False).returncode == 0,
            nodes[0],
            log,
        )
        token = tmp_path / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
        nodes.append(launching.start([NODE, "join", address, *one], log, variables))
        output = tmp_path / "run"
        given = launching.words(tiny_target, output)
        placed = ("--topology=disaggregated", f"ray.address={address}", "pipeline.store=stream")
        driver = launching.start(["torchspec", "train", *given, *placed], tmp_path / "driver.log", variables)
        nodes.append(driver)
        code, text = launching.ended(driver, tmp_path / "driver.log")
        assert code == 0, text + log.read_text()
    finally:
        launching.end(*reversed(nodes))
    assert len(launching.figures(output)) == 12


def test_a_node_does_not_join_without_the_token(tmp_path: Path, launching: ModuleType) -> None:
    variables = launching.environment(HOME=str(tmp_path), RAY_AUTH_MODE="token")
    variables.pop("RAY_AUTH_TOKEN_PATH", None)
    ran = subprocess.run([NODE, "join", "127.0.0.1:1"], env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "copy it from the first node" in ran.stderr
    ran = subprocess.run([NODE, "join", "here"], env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "node.sh head [ADDRESS]" in ran.stderr


def test_ray_up_takes_the_file_of_the_cluster() -> None:
    """What `ray up` does with it before it reaches for a machine."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((LAUNCH / "ray" / "cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"])
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert "ray stop" in command or "RAY_AUTH_MODE=token" in command
