"""The scripts for Slurm, run with programs that play `srun` and `scontrol`: ranks over gloo, Ray with two nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch"
TRAIN, APART = LAUNCH / "slurm" / "train.sbatch", LAUNCH / "slurm" / "disaggregated.sbatch"


@pytest.fixture
def slurm(tmp_path: Path, launching: ModuleType) -> dict[str, str]:
    """The variables of a job's script; PLAYED/asked is what it asked of Slurm."""
    played, programs = tmp_path / "played", tmp_path / "programs"
    played.mkdir()
    programs.mkdir()
    player = Path(__file__).with_name("slurm_player.py")
    for name in ("srun", "scontrol"):
        program = programs / name
        # `exec -a` would lose the name: an interpreter takes it from the script it runs.
        (programs / f"{name}.d").mkdir()
        (programs / f"{name}.d" / name).symlink_to(player)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{programs}/{name}.d/{name}" "$@"\n')
        program.chmod(0o755)
    found = launching.environment(
        PLAYED=str(played),
        HOME=str(tmp_path),
        SLURM_JOB_ID=str(launching.free_port(20000, 30000) - 20000),
        SLURM_CPUS_PER_TASK="1",
    )
    return {**found, "PATH": f"{programs}{os.pathsep}{found['PATH']}"}


def asked(slurm: dict[str, str]) -> list[str]:
    return (Path(slurm["PLAYED"]) / "asked").read_text().splitlines()


@pytest.mark.parametrize("script", [TRAIN, APART], ids=lambda path: path.stem)
def test_slurm_reads_what_the_script_asks_for(script: Path) -> None:
    """`#SBATCH` lines stand before the first command, each with one option that sbatch has."""
    options = {
        "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue",
        "open-mode", "output",
    }  # fmt: skip
    lines = script.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    asked_for = [line for line in lines if line.startswith("#SBATCH")]
    assert asked_for == [line for line in lines[:first] if line.startswith("#SBATCH")]
    assert {re.sub(r"^#SBATCH --([\w-]+).*", r"\1", line) for line in asked_for} == options
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_queued_again_and_goes_on(
    slurm: dict[str, str], tiny_target: Path, tmp_path: Path, launching: ModuleType
) -> None:
    def given(name: str) -> list[str]:
        return [*launching.words(tiny_target, tmp_path / name), "parallel.ulysses=2"]

    alone_log = tmp_path / "alone.log"
    alone = ["torchspec", "train", "--nproc", "2", *given("alone")]
    undisturbed = launching.start(alone, alone_log, launching.environment())
    job = {**slurm, "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    log = tmp_path / "job.log"
    process = launching.start([TRAIN, *given("run")], log, job)
    try:
        launching.wait_for(lambda: launching.steps(tmp_path / "run") >= 3, process, log)
        for task in (Path(slurm["PLAYED"]) / "tasks").read_text().split():
            os.kill(int(task), signal.SIGINT)
        assert launching.ended(process, log)[0] == 130
        assert launching.steps(tmp_path / "run") < 12
        assert asked(slurm)[-1] == f"scontrol requeue {slurm['SLURM_JOB_ID']}"
        process = launching.start([TRAIN, *given("run")], log, job)
        code, text = launching.ended(process, log)
        assert code == 0, text
        assert launching.ended(undisturbed, alone_log)[0] == 0
    finally:
        launching.end(process, undisturbed)
    assert launching.figures(tmp_path / "run") == launching.figures(tmp_path / "alone")
    assert len([line for line in asked(slurm) if "requeue" in line]) == 1


@pytest.mark.slow
def test_a_job_with_a_cluster_of_its_own(
    slurm: dict[str, str], tiny_target: Path, tmp_path: Path, launching: ModuleType
) -> None:
    """Two nodes of Ray; the time is over, then the same job runs to its end and leaves nothing behind."""
    pytest.importorskip("ray", reason='pip install "torchspec[ray]"')
    job = {**slurm, "SLURM_JOB_NODELIST": "localhost,127.0.0.1", "SLURM_NTASKS": "2"}
    log, output = tmp_path / "job.log", tmp_path / "run"
    given = [*launching.words(tiny_target, output), "pipeline.store=stream"]
    process = launching.start([APART, *given], log, job)
    try:
        launching.wait_for(lambda: launching.steps(output) >= 3, process, log)
        token = tmp_path / f".torchspec-ray-{slurm['SLURM_JOB_ID']}.token"
        assert token.stat().st_mode & 0o777 == 0o600
        process.send_signal(signal.SIGUSR1)
        code, text = launching.ended(process, log)
        assert code == 143, text
        assert asked(slurm)[-1] == f"scontrol requeue {slurm['SLURM_JOB_ID']}"
        assert not token.exists()
        process = launching.start([APART, *given], log, job)
        code, text = launching.ended(process, log)
        assert code == 0, text
    finally:
        launching.end(process)
    assert len(launching.figures(output)) == 12
    assert len([line for line in asked(slurm) if line.startswith("srun")]) == 4
