"""The Slurm recipe on two hosts: the job's own script, with stand-ins for `srun` and `scontrol` alone."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from namespaces.cluster import ROOT, Cluster, give_model, tokens_of
from namespaces.hosts import Hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SCRIPT = ROOT / "docs" / "deploy" / "slurm.sbatch"


def test_a_job_runs_over_its_machines_and_leaves_no_token(tmp_path: Path, tiny_model: Path) -> None:
    """Guards the recipe: all machines are waited for, a stage is on each, and the token goes with the job."""
    with Hosts(tmp_path / "hosts", 2) as hosts:
        give_model(hosts, tiny_model)
        file = Cluster(hosts).run_file(hosts[0])
        programs, home = tmp_path / "bin", tmp_path / "home"
        programs.mkdir()
        home.mkdir()
        enter = "".join(f'{hosts[i].name}) exec {shlex.join(hosts[i].command([]))} "$@" ;;\n' for i in range(2))
        _program(programs / "srun", _SRUN.format(enter=enter))
        _program(programs / "scontrol", "echo host0\necho host1\n")
        environment = {
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "SLURM_JOB_ID": "4321",
            "SLURM_JOB_NODELIST": "host[0-1]",
            "RAY_START_ARGS": "--num-cpus=4",
        }
        command = ["bash", SCRIPT, file, "--json", "--set", "cluster.address=auto"]  # the job says which
        output = hosts[0].run(command, environment, timeout_s=240)
    document = json.loads(output[output.index("\n{") :] if "\n{" in output else output)
    assert [rank["node"] for rank in document["plan"]["ranks"]] == [0, 0, 1, 1]
    assert all(len(tokens) == 24 for tokens in tokens_of(document))
    assert list(home.glob(".dist-infer-*")) == []


_SRUN = """\
machine=
while [[ $1 == --* ]]; do
    case $1 in --nodelist=*) machine=${{1#*=}} ;; esac
    shift
done
case $machine in
{enter}esac
"""


def _program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)
