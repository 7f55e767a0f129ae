"""The files people deploy with say what is so: paths, ports, imports, versions, times. No container is built here."""

from __future__ import annotations

import asyncio
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI

from dist_infer import load_config
from dist_infer.config import RunConfig
from dist_infer.openai.app import Settings, make_app
from dist_infer.openai.guard import OPEN_PATHS
from dist_infer.openai.keys import KeyRing
from dist_infer.openai.service import Service
from dist_infer.serve_config import ServeConfig, ServeLimits

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "docs" / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
_CLOSE_S = 30  # what `launch` gives the replica to end, beyond the drain


def objects(file: Path) -> dict[str, dict[str, Any]]:
    """A manifest's documents by kind."""
    found = {each["kind"]: each for each in yaml.safe_load_all(file.read_text(encoding="utf-8"))}
    assert all(each["apiVersion"] and each["metadata"]["name"] for each in found.values())
    return found


def run_file(kinds: dict[str, dict[str, Any]]) -> RunConfig:
    return load_config(yaml.safe_load(kinds["ConfigMap"]["data"]["serve.yaml"]))


def serve_section(config: RunConfig) -> ServeConfig:
    assert isinstance(config.run, ServeConfig)
    return config.run


def pods(kinds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    if "Deployment" in kinds:
        return [kinds["Deployment"]["spec"]["template"]["spec"]]
    cluster = kinds["RayService"]["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_probes_are_routes() -> None:
    """Guards against a pod that is ended because a route was renamed, or because a probe has no key."""
    (pod,) = pods(objects(DEPLOY / "kubernetes.yaml"))
    (container,) = pod["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health/startup",
        "liveness": "/health/live",
        "readiness": "/health/ready",
    }
    assert {probe["path"] for probe in probes.values()} <= OPEN_PATHS & set(_routes())
    assert "/metrics" in _routes()
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {probe["port"] for probe in probes.values()} <= set(named)


def _routes() -> list[str]:
    async def make() -> FastAPI:
        service = Service(model_name="tiny", limits=ServeLimits())
        service.close()
        return make_app(service, Settings(keys=KeyRing()))

    return [getattr(route, "path", "") for route in asyncio.run(make()).routes]


def test_ports_agree() -> None:
    """Guards against a service, a check or an image that looks at another port than the run file's."""
    kinds = objects(DEPLOY / "kubernetes.yaml")
    run = serve_section(run_file(kinds))
    (container,) = pods(kinds)[0]["containers"]
    assert [port["containerPort"] for port in container["ports"]] == [run.port]
    assert not run.is_local  # probes come from the node
    annotations = kinds["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(run.port)
    served = serve_section(load_config(ROOT / "configs" / "serve.yaml"))
    assert f"EXPOSE {served.port}\n" in DOCKERFILE
    assert f"http://127.0.0.1:{served.port}/health/ready" in DOCKERFILE
    (service,) = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    assert service["ports"] == [f"127.0.0.1:{served.port}:{served.port}"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda file: file.stem)
def test_time_to_drain(manifest: Path) -> None:
    """Guards open answers against a kill before their time is over."""
    kinds = objects(manifest)
    drain_s = serve_section(run_file(kinds)).limits.drain_time
    for pod in pods(kinds):
        (container,) = pod["containers"]
        stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        assert pod["terminationGracePeriodSeconds"] >= int(stop[1]) + drain_s + _CLOSE_S
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["dist-infer"]
    assert int(compose["stop_grace_period"].rstrip("s")) >= drain_s + _CLOSE_S


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda file: file.stem)
def test_pods_have_no_rights_and_no_secret(manifest: Path) -> None:
    """Guards against root, and against a key that stands in a manifest."""
    for pod in pods(objects(manifest)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert f"--uid {pod['securityContext']['runAsUser']} " in DOCKERFILE
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert [set(entry) for entry in container["env"]] == [{"name", "valueFrom"}]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # Ray's own fields
def test_serve_config_files() -> None:
    """Guards both Serve config files: Serve takes them, and `build_app` can be imported and takes their args."""
    from ray.serve.schema import ServeDeploySchema

    service = objects(DEPLOY / "rayservice.yaml")["RayService"]
    texts = [(ROOT / "configs" / "serve-ray.yaml").read_text(), service["spec"]["serveConfigV2"]]
    for text in texts:
        schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
        (application,) = schema.applications
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert set(application.args) == {"config"}
        assert schema.http_options.port == 8000
    config = yaml.safe_load(texts[0])["applications"][0]["args"]["config"]
    assert (ROOT / config).is_file()


def test_rayservice_is_of_one_piece() -> None:
    """Guards against ranks that have no place, and a Ray that is not the image's."""
    kinds = objects(DEPLOY / "rayservice.yaml")
    config, cluster = run_file(kinds), kinds["RayService"]["spec"]["rayClusterConfig"]
    assert config.cluster.executor == "ray"
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] >= config.parallel.pipeline
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    assert cluster["authOptions"] == {"mode": "token"}


def test_dockerfile() -> None:
    """Guards the image: what it copies is there, its extras exist, its user is nobody, no secret is in it."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    assert {"constraints.txt", "pyproject.toml", "dist_infer", "launch", "configs"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    installs = re.findall(r"pip install (.*?)(?: \\|$)", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 4
    assert all(line.startswith("-c constraints.txt ") for line in installs)
    for name in re.findall(r"grep '\^([\w-]+)=='", DOCKERFILE):
        assert re.search(rf"^{name}==", (ROOT / "constraints.txt").read_text(), re.MULTILINE), name
    assert re.search(r"^USER 10001$", DOCKERFILE, re.MULTILINE)
    assert "HEALTHCHECK" in DOCKERFILE
    assert not re.search(r"(?i)(password|secret|token|api_keys?)\s*=", DOCKERFILE)


def test_compose() -> None:
    """Guards against an endpoint without keys, which `launch` would refuse on this host anyway."""
    (service,) = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    assert service["environment"]["DIST_INFER_API_KEYS"].startswith("${DIST_INFER_API_KEYS:?")
    assert service["cap_drop"] == ["ALL"]
    assert service["init"] is True
