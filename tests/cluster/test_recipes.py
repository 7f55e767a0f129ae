"""The scripts of docs/deploy with stand-ins for what they call: what is asked of those, when, and with what secrets.

With a real Ray: tests/namespaces.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parent.parent.parent / "docs" / "deploy"
SCRIPTS = sorted([*DEPLOY.glob("*.sh"), *DEPLOY.glob("*.sbatch")])


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory at the head of PATH. A stand-in writes its name and arguments to `calls`."""
    directory = tmp_path / "bin"
    directory.mkdir()
    return directory


def stand_in(programs: Path, name: str, script: str = "") -> None:
    file = programs / name
    file.write_text(f'#!/bin/bash\necho "{name} $*" >> "{programs / "calls"}"\n{script}\n')
    file.chmod(0o755)


def start(programs: Path, *command: Any, **environment: str) -> subprocess.Popen[str]:
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    own = {**os.environ, "HOME": str(programs.parent), "PATH": path, **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([str(part) for part in command], env=own, stdout=pipe, stderr=pipe, text=True)


def run(programs: Path, *command: Any, **environment: str) -> str:
    process = start(programs, *command, **environment)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    return output


def calls(programs: Path) -> list[str]:
    return (programs / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_without_arguments_says_how_it_is_called(script: Path, programs: Path) -> None:
    process = start(programs, "bash", script)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (2, "")
    assert script.name in errors


def test_machines_get_one_token_by_standard_input_and_the_first_starts_first(programs: Path) -> None:
    """Guards the token: in no argument, in a file that only its user reads."""
    stand_in(programs, "ssh", f'cd "{programs.parent}" && machine=$1 && mkdir -p "$machine" && HOME=$PWD/$1 sh -c "$2"')
    stand_in(programs, "ray")
    run(programs, DEPLOY / "ray-cluster.sh", "up", "10.1.0.1", "10.1.0.2", RAY_START_ARGS="--labels=zone=a")
    files = [programs.parent / machine / ".ray" / "auth_token" for machine in ("10.1.0.1", "10.1.0.2")]
    (token,) = {file.read_text().strip() for file in files}
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert not any(token in call for call in calls(programs))
    started = [call for call in calls(programs) if call.startswith("ray start")]
    assert "--head --node-ip-address=10.1.0.1" in started[0]
    assert "--address=10.1.0.1:6379 --node-ip-address=10.1.0.2" in started[1]
    assert all("--labels=zone=a" in call for call in started)
    run(programs, DEPLOY / "ray-cluster.sh", "down", "10.1.0.1", "10.1.0.2")
    assert calls(programs)[-4:] == ["ssh 10.1.0.2 ray stop", "ray stop", "ssh 10.1.0.1 ray stop", "ray stop"]


_SRUN = """
machine=
while [[ $1 == --* ]]; do case $1 in --nodelist=*) machine=${1#*=} ;; esac; shift; done
trap 'echo "end of $machine" >> "$CALLS"; kill $!; exit 0' TERM
"$@" & wait
"""
_LAUNCH = """
trap 'echo draining >> "$CALLS"; sleep 0.2; echo drained >> "$CALLS"; kill $!; exit 3' TERM
echo launched; sleep 30 & wait
"""


def test_a_job_drains_before_ray_ends_and_says_how_the_launch_ended(programs: Path) -> None:
    """Guards the order at the end: Ray must be there until the launch has drained. And the token goes."""
    stand_in(programs, "scontrol", "echo localhost; echo localhost")
    stand_in(programs, "srun", _SRUN)
    stand_in(programs, "ray", '[ "$1" = health-check ] || exec sleep 30')
    joined = 'until [ "$(grep -c "^ray start" "$CALLS")" = 2 ]; do sleep 0.05; done'
    stand_in(programs, "python", f'cat > /dev/null; {joined}; ls -d "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"')
    stand_in(programs, "dist-infer", _LAUNCH)
    process = start(
        programs,
        "bash",
        DEPLOY / "slurm.sbatch",
        "run.yaml",
        SLURM_JOB_ID="4321",
        SLURM_JOB_NODELIST="m[0-1]",
        CALLS=str(programs / "calls"),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "launched\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 3
    found = calls(programs)
    end = found.index("draining")
    assert found[end:] == ["draining", "drained", "end of localhost", "end of localhost"]
    assert "dist-infer launch run.yaml" in found
    assert [call for call in found if "--head" in call and call.startswith("ray start")]
    assert any("token" in call and call.startswith(str(programs.parent)) for call in found)  # it was there
    assert list(programs.parent.glob(".dist-infer-*")) == []


def test_a_kubernetes_gets_operator_keys_and_service_once(programs: Path) -> None:
    """Guards the key, which is in no argument, and every image in the manifest."""
    directory = programs.parent
    stand_in(programs, "helm", f'touch "{directory}/crd"')
    kubectl = f"""
case "$1 $2" in
"get crd") [ -e "{directory}/crd" ] ;;
"get secret") [ -e "{directory}/keys" ] ;;
"create secret") cat > "{directory}/keys" ;;
"apply -f") cat > "{directory}/applied.yaml" ;;
esac"""
    stand_in(programs, "kubectl", kubectl)
    first = run(programs, DEPLOY / "kuberay.sh", "up", IMAGE="example.org/dist-infer:1")
    key = (directory / "keys").read_text()
    assert f"key: {key.partition('=')[2]}\n" in first
    applied = (directory / "applied.yaml").read_text()
    assert len(list(yaml.safe_load_all(applied))) == 2
    assert set(re.findall(r"image: (.*)", applied)) == {"example.org/dist-infer:1"}
    assert not any(key.partition("=")[2] in call for call in calls(programs))
    assert "--version 1.5.1" in next(call for call in calls(programs) if call.startswith("helm"))
    again = run(programs, DEPLOY / "kuberay.sh", "up", IMAGE="example.org/dist-infer:2")
    assert "key:" not in again
    assert sum(call.startswith("helm") for call in calls(programs)) == 1
    assert calls(programs)[-1].startswith("kubectl wait --for=condition=Ready")
    assert "kuberay.sh" in start(programs, DEPLOY / "kuberay.sh", "sideways").communicate(timeout=30)[1]
