"""Manifests and images of examples/launch: the types of their fields, what they ask for, what they leave open."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from torchspec.cli.commands.train import bare_parser
from torchspec.core.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "launch" / "kubernetes"
KINDS = ("job", "job-npu", "ray", "ray-npu")
IMAGES = sorted([*FOLDER.glob("*Dockerfile"), *(ROOT / "ci" / "docker").glob("*.Dockerfile")])
SCRIPTS = sorted([*FOLDER.parent.rglob("*.sh"), *FOLDER.parent.rglob("*.sbatch"), ROOT / "ci" / "images"])
ACCELERATORS = {"nvidia.com/gpu", "huawei.com/Ascend910"}
POD = "V1PodTemplateSpec"
# Of KubeRay's API, group ray.io, version v1: the fields used here of RayJobSpec, RayClusterSpec and their groups.
RAY_JOB = {
    "entrypoint": "str", "submissionMode": "str", "shutdownAfterJobFinishes": "bool", "ttlSecondsAfterFinished": "int",
    "backoffLimit": "int", "activeDeadlineSeconds": "int", "suspend": "bool",
}  # fmt: skip
RAY_CLUSTER = {"rayVersion": "str", "enableInTreeAutoscaling": "bool"}
HEAD_GROUP = {"serviceType": "str", "rayStartParams": "Dict[str, str]", "template": POD}
WORKER_GROUP = {
    "groupName": "str", "replicas": "int", "minReplicas": "int", "maxReplicas": "int", "numOfHosts": "int",
    "rayStartParams": "Dict[str, str]", "template": POD,
}  # fmt: skip


@cache
def objects(kind: str) -> list[dict[str, Any]]:
    """As `kubectl apply -k` sends them; they are read alone."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which knows kustomize, is not installed")
    command = ["kubectl", "kustomize", str(FOLDER / kind)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return list(yaml.safe_load_all(ran.stdout))


def only(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (one,) = [each for each in found if each["kind"] == kind]
    return one


def templates(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all pods."""
    made = []
    for each in found:
        if each["kind"] == "Job":
            made.append(each["spec"]["template"])
        if each["kind"] == "RayJob":
            cluster = each["spec"]["rayClusterSpec"]
            made += [cluster["headGroupSpec"]["template"]]
            made += [group["template"] for group in cluster["workerGroupSpecs"] for _ in range(group["replicas"])]
    return made


def problems(value: Any, kind: str, where: str = "") -> Iterator[str]:
    """Of a value of the Kubernetes API: fields there are none of, other types, what is missing."""
    client = pytest.importorskip("kubernetes.client", reason="pip install kubernetes")
    plain = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "datetime": str}
    of, inner = kind.partition("[")[::2]
    if kind in plain:
        if not isinstance(value, plain[kind]) or (kind == "int" and isinstance(value, bool)):
            yield f"{where}: {value!r} is no {kind}"
    elif of == "List":
        for number, each in enumerate(value):
            yield from problems(each, inner[:-1], f"{where}[{number}]")
    elif of == "Dict":
        for name, each in value.items():
            yield from problems(each, inner[:-1].split(", ")[1], f"{where}.{name}")
    else:
        model = getattr(client, kind)
        names = {field: name for name, field in model.attribute_map.items()}
        for field, each in value.items():
            if field not in names:
                yield f"{where}.{field}: {kind} has no such field"
            else:
                yield from problems(each, model.openapi_types[names[field]], f"{where}.{field}")
        try:
            model(**{names[field]: each for field, each in value.items() if field in names})
        except ValueError as error:
            yield f"{where}: {error}"


def rays_problems(spec: dict[str, Any]) -> Iterator[str]:
    cluster = spec["rayClusterSpec"]
    parts = [
        (spec, {**RAY_JOB, "rayClusterSpec": ""}, "spec"),
        (cluster, {**RAY_CLUSTER, "headGroupSpec": "", "workerGroupSpecs": ""}, "spec.rayClusterSpec"),
        (cluster["headGroupSpec"], HEAD_GROUP, "headGroupSpec"),
        *((group, WORKER_GROUP, "workerGroupSpecs") for group in cluster["workerGroupSpecs"]),
    ]
    for values, fields, where in parts:
        yield from (f"{where}.{field}: no such field" for field in values if field not in fields)
        for field, value in values.items():
            if fields.get(field):
                yield from problems(value, fields[field], f"{where}.{field}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_one_of_the_api(kind: str) -> None:
    models = {"Job": "V1Job", "ConfigMap": "V1ConfigMap", "NetworkPolicy": "V1NetworkPolicy"}
    found = objects(kind)
    wrong = [each for one in found if one["kind"] != "RayJob" for each in problems(one, models[one["kind"]])]
    for one in found:
        if one["kind"] == "RayJob":
            assert (one["apiVersion"], set(one)) == ("ray.io/v1", {"apiVersion", "kind", "metadata", "spec"})
            wrong += [*problems(one["metadata"], "V1ObjectMeta"), *rays_problems(one["spec"])]
    assert not wrong, "\n".join(wrong)


def test_the_volume_is_one_that_all_pods_may_write_to() -> None:
    volume = yaml.safe_load((FOLDER / "volume.yaml").read_text())
    assert not list(problems(volume, "V1PersistentVolumeClaim"))
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    for kind in KINDS:
        for pod in templates(objects(kind)):
            claims = [each["persistentVolumeClaim"]["claimName"] for each in pod["spec"]["volumes"] if len(each) == 2
                      and "persistentVolumeClaim" in each]  # fmt: skip
            assert claims == [volume["metadata"]["name"]]


def test_a_wrong_manifest_is_seen() -> None:
    pod = {"spec": {"containers": [{"image": 3, "imagePolicy": "Always"}], "hostNetwork": "yes"}}
    told = "\n".join(problems(pod, POD))
    assert "3 is no str" in told
    assert "imagePolicy: V1Container has no such field" in told
    assert "'yes' is no bool" in told
    assert "name\n  Field required" in told


@pytest.mark.parametrize("kind", KINDS)
def test_pods_have_no_rights_and_files_no_secrets(kind: str) -> None:
    found = objects(kind)
    assert not [each for each in found if each["kind"] == "Secret"]
    assert templates(found)
    for pod in templates(found):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}} in spec["volumes"]
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            named = {volume["name"] for volume in spec["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == named
            assert ":latest" not in container["image"]
            for variable in container["env"]:
                assert not any(word in variable["name"] for word in ("TOKEN", "SECRET", "PASSWORD", "KEY"))
    if kind.startswith("ray"):
        policy = only(found, "NetworkPolicy")["spec"]
        inside = policy["podSelector"]["matchLabels"].items()
        assert all(inside <= pod["metadata"]["labels"].items() for pod in templates(found))
        assert [each for each in policy["ingress"] if "ports" not in each] == [
            {"from": [{"podSelector": policy["podSelector"]}]}
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_has_the_settings_it_names_and_uses_all_accelerators(
    kind: str, tiny_target: Path, tmp_path: Path
) -> None:
    found = objects(kind)
    settings = only(found, "ConfigMap")
    pods = templates(found)
    for pod in pods:
        assert {"name": "config", "configMap": {"name": settings["metadata"]["name"]}} in pod["spec"]["volumes"]
    limits = [pod["spec"]["containers"][0]["resources"]["limits"] for pod in pods]
    (resource,) = {name for each in limits for name in each} & ACCELERATORS
    accelerators = sum(int(each[resource]) for each in limits)
    if kind.startswith("job"):
        words = only(found, "Job")["spec"]["template"]["spec"]["containers"][0]["command"]
    else:
        words = shlex.split(only(found, "RayJob")["spec"]["entrypoint"])
    assert words[:2] == ["torchspec", "train"]
    values, overrides, wrong = bare_parser().split(words[2:])
    assert not wrong
    for name in ("config", "dry_run", "json"):
        values.pop(name)
    nproc = int(values.pop("nproc"))
    assert values["device"] == ("npu" if kind.endswith("npu") else "cuda")
    text = (FOLDER / kind.removesuffix("-npu") / "run.yaml").read_text()
    assert settings["data"] == {"run.yaml": text}
    file, data = tmp_path / "run.yaml", tmp_path / "conversations.jsonl"
    data.write_text("{}")
    file.write_text(text.replace("/data/targets/my-target", str(tiny_target)).replace("/data/", f"{tmp_path}/"))
    config, _ = load_config(file=file, flags=values, overrides=overrides, planned=True)
    pipeline = config.pipeline
    engines = (pipeline.engines or 0) * config.engine.tensor_parallel
    assert accelerators == (engines + (pipeline.trainers or 0) if kind.startswith("ray") else nproc)


def test_one_version_of_ray() -> None:
    """Of the cluster, of both images, and one that torchspec takes."""
    job = yaml.safe_load((FOLDER / "ray" / "rayjob.yaml").read_text())
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    for path in (FOLDER / "Dockerfile", FOLDER / "ascend.Dockerfile"):
        assert f"ARG RAY={version}\n" in path.read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requirement = pytest.importorskip("packaging.requirements").Requirement(extras["ray"][0])
    assert requirement.specifier.contains(version)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_images_are_pinned_and_run_as_nobody_special(path: Path) -> None:
    lines = [line.strip() for line in path.read_text().replace("\\\n", " ").splitlines()]
    arguments = dict(line.split(None, 1)[1].partition("=")[::2] for line in lines if line.startswith("ARG "))
    for line in lines:
        if line.startswith("FROM "):
            image = line.split()[1]
            for name, value in arguments.items():
                image = image.replace(f"${{{name}}}", value)
            _, colon, tag = image.rpartition(":")
            assert colon, line
            assert any(character.isdigit() for character in tag), line
        if line.startswith(("ENV ", "ARG ")):
            assert not any(word in line.upper() for word in ("SECRET", "PASSWORD", "TOKEN", "API_KEY"))
        if line.startswith("COPY ") and "--from" not in line:
            source = line.split()[-2]
            assert (ROOT / source).exists(), line
        assert "torch==" not in line, f"versions are those of ci/requirements: {line}"
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    if path.name == "ascend.Dockerfile" and path.parent.name == "docker":
        assert not users
        assert "# As root:" in path.read_text()
    else:
        assert users[-1].split(":")[0] not in ("0", "root")


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_images_pass_the_linter(path: Path) -> None:
    _lint("hadolint", "--config", ROOT / "ci" / "hadolint.yaml", path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_the_linter(path: Path) -> None:
    assert path.stat().st_mode & 0o111
    _lint("shellcheck", path)


def test_what_docker_copies_has_no_environment() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", ".tox", ".engines", "**/__pycache__", "runs"} <= set(ignored)
    assert ".git" not in ignored


def _lint(*words: str | Path) -> None:
    # ci/test does not put the environment's folder of scripts on the path.
    tool = shutil.which(str(words[0]), path=sysconfig.get_path("scripts")) or shutil.which(str(words[0]))
    if tool is None:
        pytest.skip(f"{words[0]} is not installed: pip install -r ci/requirements/launch.txt")
    ran = subprocess.run([tool, *map(str, words[1:])], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
