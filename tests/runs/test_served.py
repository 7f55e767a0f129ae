"""One detached run on Ray, with everything that is asked of it while it serves; in the order of the file."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from named_runs import Shell, WriteRun, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BODY = {"prompt": "the sea", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
ROGUE: dict[str, bytes] = {
    "half-open": b"",
    "zeros": bytes(10_000),
    "ones": b"\xff" * 10_000,
    "garbage": random.Random(0).randbytes(4096),
    "half a request": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n",
    "half of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Iterator[Shell]:
    directory = tmp_path_factory.mktemp("served-run")
    file = write_run(directory, cluster={"executor": "ray"}, parallel={"tensor": 2})
    shell = Shell(directory)
    try:
        done = shell.run("launch", file, "--detach")
        assert done.code == 0, done.err
        assert "/v1" in done.out
        yield shell
    finally:
        shell.close()


@pytest.fixture(scope="module")
def url(run: Shell) -> str:
    return str(run.status("tiny")["url"])


def ask(url: str) -> str:
    answer: dict[str, Any] = httpx.post(f"{url}/v1/completions", json=BODY, timeout=30).raise_for_status().json()
    return str(answer["choices"][0]["text"])


def listeners(run: Shell) -> dict[tuple[str, int], str]:
    """(address, port) to the name of the process that listens there."""
    found = {}
    for process in run.processes():
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip, connection.laddr.port] = process.name()
    return found


def test_nothing_listens_beyond_this_machine(run: Shell, url: str) -> None:
    """Ray, Serve, rendezvous, gloo and the endpoint: on loopback alone, since this run is this machine's alone."""
    found = listeners(run)
    assert len(found) >= 15, found
    assert {address.removeprefix("::ffff:") for address, _ in found} == {"127.0.0.1"}, found


def test_the_token_is_seen_nowhere(run: Shell, url: str) -> None:
    """Not in `ps`, environments, logs, records or what commands print; only in its file, which is the user's alone."""
    status = run.status("tiny")
    home = Path(status["home"])
    token = (home / "token").read_text().encode()
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "token").stat().st_mode & 0o777 == 0o600
    places = {f"environment of {pid}": f"/proc/{pid}/environ" for pid in psutil.pids()}
    places |= {f"command line of {pid}": f"/proc/{pid}/cmdline" for pid in psutil.pids()}
    files = [path for root in (run.state, home) for path in root.rglob("*") if path.is_file() and path.name != "token"]
    places |= {str(path): str(path) for path in files}
    for name, path in places.items():
        with contextlib.suppress(OSError):
            assert token not in Path(path).read_bytes(), name
    done = run.run("launch", Path(status["file"]))
    assert done.code == 2
    printed = [done.out, done.err, json.dumps(status)]
    printed += [run.run("logs", "tiny", *which).out for which in ((), ("1",), ("replica",))]
    assert token.decode() not in "".join(printed)


def test_a_stranger_on_any_port_disturbs_nobody(run: Shell, url: str) -> None:
    """Garbage, zeros and half-open connections on every port: requests are answered before, meanwhile and after."""
    baseline, before = ask(url), {process.pid for process in run.processes()}
    with contextlib.ExitStack() as stack:
        for (_, port), name in listeners(run).items():
            for data in ROGUE.values():
                stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                with contextlib.suppress(OSError):  # cut off in the middle of it
                    stranger.sendall(data)
            assert ask(url) == baseline, name
    assert ask(url) == baseline
    assert {process.pid for process in run.processes()} >= before, "somebody has died of it"


def test_logs_of_everybody(run: Shell, url: str) -> None:
    for which, line in (((), "serving tiny at"), (("0",), "rank 0"), (("1",), "rank 1"), (("replica",), ": replica")):
        done = run.run("logs", "tiny", *which)
        assert done.code == 0, done.err
        assert line in done.out
    assert run.run("logs", "tiny", "7").code == 2
    assert run.run("logs", "tiny", "x").code == 2


@pytest.mark.parametrize("who", ["ServeController", "ServeReplica"])
def test_what_serve_replaces(who: str, run: Shell) -> None:
    """T07: a killed controller or replica is replaced, and where it answers then is known."""
    (victim,) = [process for process in run.processes() if who in "".join(process.cmdline())]
    victim.kill()
    psutil.wait_procs([victim], timeout=5)

    def is_back() -> bool:
        found = run.record("tiny")
        with contextlib.suppress(httpx.HTTPError):
            return found.state == "ready" and bool(ask(str(found.url)))
        return False

    if who == "ServeReplica":
        until(lambda: run.record("tiny").state == "degraded", 20)
    until(is_back, 60)


def test_drain_then_down(run: Shell) -> None:
    """A request that runs is finished, a new one is refused; then nothing is left, token and Ray's files included."""
    status = run.status("tiny")
    texts: list[str] = []

    def stream() -> None:
        body = {**BODY, "max_tokens": 220, "stream": True, "n": 16}
        texts.append(httpx.post(f"{status['url']}/v1/completions", json=body, timeout=60).text)

    running = threading.Thread(target=stream)
    running.start()
    until(lambda: "dist_infer_http_open_answers 16" in httpx.get(f"{status['url']}/metrics").text, 20)
    done = run.run("drain", "tiny")
    running.join(60)
    assert (done.code, done.out) == (0, "tiny: drained\n")
    assert texts[0].endswith("data: [DONE]\n\n")
    assert "error" not in texts[0]
    assert httpx.post(f"{status['url']}/v1/completions", json=BODY).status_code == 503
    assert run.status("tiny")["state"] == "drained"
    assert run.run("drain", "tiny").code == 0
    guardian = run.guardian(status["pid"])
    assert run.run("down", "tiny").out == "tiny: ended\n"
    run.assert_nothing_left()
    assert not os.path.exists(status["home"])
    psutil.wait_procs([guardian], timeout=10)
    assert not guardian.is_running()
    assert run.run("down", "tiny").out == "tiny: nothing is there\n"
