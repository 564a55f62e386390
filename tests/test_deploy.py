"""What cannot be run here is read: instructions of the Dockerfile, fields of the manifests, arguments of the app."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
INSTRUCTIONS = set("FROM RUN CMD ENTRYPOINT COPY ENV EXPOSE USER WORKDIR HEALTHCHECK STOPSIGNAL ARG LABEL".split())


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_dockerfile() -> None:
    """Known instructions; stages that exist; files that exist; extras that exist; nobody is root at the end."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for instruction, rest in instructions():
        assert instruction in INSTRUCTIONS, instruction
        if instruction == "FROM":
            source, _, name = rest.split()
            assert source in stages or re.fullmatch(r"python:3\.\d+-slim", source)
            current = stages[name] = []
        current.append((instruction, rest))
    assert {"cpu", "gpu"} <= stages.keys()
    for stage in stages.values():
        for instruction, rest in stage:
            if instruction == "COPY":
                *sources, _ = rest.split()
                if sources[0].startswith("--from="):
                    assert sources.pop(0).removeprefix("--from=") in stages
                else:
                    assert all((ROOT / source).exists() for source in sources), sources
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("cpu", "gpu"):
        assert ("USER", "10001") in stages[name] and ("ENTRYPOINT", '["moegraft"]') in stages[name]
        wanted = re.search(r"\.whl\)\[([a-z,]+)\]", str(stages[name]))
        assert wanted is not None and set(wanted[1].split(",")) <= extras.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="the test extra has hadolint for Linux only")
def test_hadolint() -> None:
    program = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([program, "--no-color", DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout


def check_serve(config: dict[str, Any]) -> Any:
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    from ray.serve.schema import ServeDeploySchema

    from moegraft.serving.ray_app import Settings, build

    parsed = ServeDeploySchema.model_validate(config)
    (application,) = parsed.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    return Settings(**application.args)


def test_serve_yaml() -> None:
    settings = check_serve(yaml.safe_load((DEPLOY / "serve.yaml").read_text()))
    assert settings.parallel.world_size == 1


def test_rayservice() -> None:
    """The Serve part is what Ray takes; containers, mounts and secrets are there on head and workers."""
    manifest = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    settings = check_serve(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    cluster = manifest["spec"]["rayClusterConfig"]
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={cluster['rayVersion']}\n" in constraints
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= settings.min_replicas and workers["maxReplicas"] >= settings.max_replicas
    for group in (cluster["headGroupSpec"], workers):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        names = {variable["name"] for variable in container["env"]}
        assert names == {"MOEGRAFT_API_KEY", "MOEGRAFT_ADMIN_KEY"}
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["resources"]["limits"] == container["resources"]["requests"]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > settings.drain_seconds
    assert int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) == 1
