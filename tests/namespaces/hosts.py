"""Hosts on one machine: a network namespace each, on one switch, with a host name, an address and a disk of their own.

        host0 10.77.0.1      host1 10.77.0.2      host2 10.77.0.3
             │ eth0               │ eth0               │ eth0           a veth pair each; `cut(n)` takes its port down
        ┌────┴────────────────────┴────────────────────┴────┐
        │ br0, in a namespace of its own                    │           nothing of it touches the machine's network
        └───────────────────────────────────────────────────┘

What a host runs sees its own directory at `disk` and at /tmp/ray. Processes and memory are the machine's.

    python tests/namespaces/hosts.py 2      makes two, says how to run something in them, removes them at end of input
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

NETWORK = "10.77.0"
_RAY_DIRECTORY = Path("/tmp/ray")
_NAME = re.compile(r"^di(\d+)-")
_COMMAND_S = 30.0


class Host:
    """One of them; made by `Hosts`."""

    def __init__(self, hosts: Hosts, index: int) -> None:
        self._hosts, self.index = hosts, index
        self.name, self.address = f"host{index}", f"{NETWORK}.{index + 1}"
        self.namespace = hosts.namespace(self.name)
        self.own = hosts.directory / self.name  # what it sees at hosts.disk
        (self.own / "disk").mkdir(parents=True)
        (self.own / "ray").mkdir()

    def command(self, arguments: Sequence[str | Path]) -> list[str]:
        """What runs these arguments in the host; the process that it becomes is theirs, not a wrapper's."""
        mounts = (
            (self.own / "disk", self._hosts.disk),
            (self.own / "ray", _RAY_DIRECTORY),
            (self._hosts.names, Path("/etc/hosts")),
        )
        script = " && ".join(
            [f"hostname {self.name}", *(shlex.join(["mount", "--bind", str(a), str(b)]) for a, b in mounts)]
        )
        inside = ["unshare", "--uts", "sh", "-c", f'{script} && exec "$@"', "sh", *map(str, arguments)]
        return ["ip", "netns", "exec", self.namespace, *inside]

    def popen(
        self, arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        own = {**os.environ, **(environment or {})}
        return subprocess.Popen(self.command(arguments), text=True, env=own, start_new_session=True, **options)

    def run(
        self, arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> str:
        """Its output; AssertionError with all that it said when it fails."""
        # files, no pipes: what it leaves running would keep those open
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.popen(arguments, environment, stdout=out, stderr=err)
            try:
                process.wait(timeout_s)
                how = f"ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                how = f"did not end within {timeout_s} s"
            out.seek(0)
            err.seek(0)
            output, errors = out.read(), err.read()
        assert process.returncode == 0, f"{arguments} {how}:\n{output}\n{errors}"
        return output

    def pids(self) -> list[int]:
        """Of all that runs in it. By its namespace: a process may have overwritten its environment with its title."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]


class Hosts:
    """`with Hosts(directory, 2) as hosts:`. Needs root and iproute2; fails with what is missing where they are not."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        self.disk, self.names = directory / "disk", directory / "hosts"
        self.disk.mkdir(parents=True)
        self._prefix = f"di{os.getpid()}-{uuid.uuid4().hex[:4]}"
        self._all = [Host(self, index) for index in range(count)]

    def __getitem__(self, index: int) -> Host:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)

    def __enter__(self) -> Hosts:
        if os.geteuid() != 0:
            raise PermissionError("hosts are network namespaces, which only root can make")
        if shutil.which("ip") is None:
            raise FileNotFoundError("there is no `ip`: scripts/setup-tests installs iproute2")
        _remove_leftovers()
        with contextlib.suppress(FileExistsError):
            _RAY_DIRECTORY.mkdir()
        own = "".join(f"{host.address} {host.name}\n" for host in self._all)
        self.names.write_text(f"127.0.0.1 localhost\n{own}")
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def cut(self, index: int) -> None:
        """Unplug the host's cable at the switch: what is sent is lost, nobody is told."""
        _ip("-n", self.namespace("switch"), "link", "set", f"port{index}", "down")

    def restore(self, index: int) -> None:
        _ip("-n", self.namespace("switch"), "link", "set", f"port{index}", "up")

    def close(self) -> None:
        """End what runs in them and take them away. Idempotent."""
        for namespace in _namespaces():
            if namespace.startswith(f"{self._prefix}-"):
                _remove(namespace)

    def _make(self) -> None:
        switch = self.namespace("switch")
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for host in self._all:
            _ip("netns", "add", host.namespace)
            port = f"port{host.index}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", port, "master", "br0")
            _ip("-n", switch, "link", "set", port, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")


def _namespaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=_COMMAND_S)
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]


def _remove_leftovers() -> None:
    """Of processes that were killed: a namespace would stay for ever."""
    for namespace in _namespaces():
        owner = _NAME.match(namespace)
        if owner is not None and not psutil.pid_exists(int(owner[1])):
            _remove(namespace)


def _remove(namespace: str) -> None:
    """With all that runs in it."""
    until = time.monotonic() + _COMMAND_S
    while pids := [int(pid) for pid in _ip("netns", "pids", namespace).split()]:  # what is being started is found next
        assert time.monotonic() < until, f"{pids} in {namespace} do not end"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=1)
    _ip("netns", "del", namespace)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as directory, Hosts(Path(directory), count) as hosts:
        for index in range(count):
            host = hosts[index]
            print(f"{host.name} {host.address}: {shlex.join(host.command(['bash']))}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
