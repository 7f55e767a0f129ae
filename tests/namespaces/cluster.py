"""A Ray cluster across hosts, started by the recipe that docs/deploy has for people, and launches on it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from namespaces.hosts import Host, Hosts
from tokenizer_kinds import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = ROOT / "docs" / "deploy" / "ray-cluster.sh"
_START_S = 90.0


class Cluster:
    """Ray on two hosts. `disk` is the path that each of them has its own directory at."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.disk = hosts, hosts.disk
        self.environment = {
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(hosts.disk / "token"),
            "XDG_STATE_HOME": str(hosts.disk / "state"),
        }

    def start(self) -> None:
        """By the recipe; instead of ssh, a script that enters the host of that address."""
        remote = self.hosts.directory / "remote"
        cases = "".join(
            f'{host.address}) exec {shlex.join(host.command(["sh", "-c"]))} "$2" ;;\n' for host in self._each()
        )
        remote.write_text(f'#!/bin/sh\ncase $1 in\n{cases}esac\necho "no host $1" >&2\nexit 1\n')
        remote.chmod(0o755)
        settings = {
            "REMOTE": str(remote),
            "RAY": str(Path(sys.executable).parent / "ray"),
            "TOKEN_FILE": str(self.disk / "token"),
            "RAY_START_ARGS": "--num-cpus=4 --disable-usage-stats --labels=tier=test",
            "PYTHONPATH": self.environment["PYTHONPATH"],  # what the cluster's own processes import
        }
        done = subprocess.run(
            [RECIPE, "up", *(host.address for host in self._each())],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def run_file(self, host: Host, **sections: Mapping[str, Any]) -> Path:
        """The run file as this host has it: TP2×PP2, a stage a host, on the disk that each has its own of."""
        config: dict[str, Any] = {
            "model": {"path": str(self.disk / "model"), "dtype": "float32"},
            "parallel": {"tensor": 2, "pipeline": 2},
            "offload": {"store": str(self.disk / "stores"), "host_memory": "64 MiB", "reader": "threads"},
            "engine": {"max_requests": 4, "max_model_len": 200, "kv_memory": "2 MiB", "max_batch_tokens": 16},
            "cluster": {"executor": "ray", "address": f"{self.hosts[0].address}:6379", "device": "cpu"},
            "run": {"kind": "generate", "chat": False, "max_tokens": 24, "ignore_eos": True, "prompts": PROMPTS},
        }
        for name, values in sections.items():
            config[name] = {**config[name], **values}
        file = host.own / "disk" / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        return self.disk / "run.yaml"

    def launch(self, host: Host, file: Path) -> dict[str, Any]:
        """`dist-infer launch FILE --json` in that host, to its end."""
        command = [sys.executable, "-m", "launch.cli", "launch", file, "--json"]
        document: dict[str, Any] = json.loads(host.run(command, self.environment, timeout_s=120))
        return document

    def _each(self) -> list[Host]:
        return [self.hosts[index] for index in range(len(self.hosts))]


def give_model(hosts: Hosts, model: Path) -> None:
    """Each host its own copy at disk/model, with times of its own."""
    for index in range(len(hosts)):
        copy = hosts[index].own / "disk" / "model"
        shutil.copytree(model, copy, copy_function=shutil.copy)
        make_tokenizer("byte-level", copy)


PROMPTS = ["the sea was", "no one who had ever seen her", "a"]


def tokens_of(document: Mapping[str, Any]) -> list[list[int]]:
    return [output["outputs"][0]["token_ids"] for output in document["outputs"]]
