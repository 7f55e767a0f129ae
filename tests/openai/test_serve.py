"""The endpoint as it is started: Ray Serve, a tiny model, signals; and its app behind Serve's own proxy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI

from dist_infer import load_config
from dist_infer.errors import ConfigError

KEY = "sk-0123456789abcdef"
MARK = "DIST_INFER_TEST_MARK"
LONG: dict[str, Any] = {"prompt": "the sea", "max_tokens": 220, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def run_file(run_config: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "serve.yaml"
    run = {"kind": "serve", "port": 0, "access_log": "access.log", "limits": {"drain_time": 30}}
    file.write_text(yaml.safe_dump({**run_config, "run": run}))
    return file


class Launched:
    """`dist-infer launch`, until its line with the URL; ended, with all it started, at the latest by `end`."""

    def __init__(self, file: Path, *arguments: str, mark: str) -> None:
        self._mark = mark
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "launch", str(file), *arguments],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, MARK: mark, "DIST_INFER_API_KEYS": f"alice={KEY}"},
        )
        self.lines: list[str] = []
        self.url = ""

    def until_serving(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("serving "):
                self.url = line.split(" at ")[1].split("/v1")[0]
                return
        raise AssertionError("".join(self.lines))

    def left(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        for process in self.left():
            process.kill()


@pytest.fixture
def launched(run_file: Path, tmp_path: Path) -> Iterator[Launched]:
    made = Launched(run_file, mark=tmp_path.name)
    yield made
    made.end()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_served_then_drained(launched: Launched, tmp_path: Path) -> None:
    """Guards the whole way through Ray Serve: answers, keys, the log, SIGTERM under load (T29), nothing left."""
    launched.until_serving()
    with OpenAI(base_url=f"{launched.url}/v1", api_key=KEY, timeout=30) as client:
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=3)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 3
    assert httpx.get(f"{launched.url}/v1/models").status_code == 401
    headers = {"authorization": f"Bearer {KEY}"}
    texts: list[str] = []

    def stream() -> None:
        body = {**LONG, "stream": True, "n": 16}
        texts.append(httpx.post(f"{launched.url}/v1/completions", json=body, headers=headers, timeout=60).text)

    running = threading.Thread(target=stream)
    running.start()
    while "dist_infer_http_open_answers 16" not in httpx.get(f"{launched.url}/metrics", headers=headers).text:
        assert not texts
    launched.process.send_signal(signal.SIGTERM)
    running.join(60)
    assert texts[0].endswith("data: [DONE]\n\n")
    assert "error" not in texts[0]
    assert launched.process.wait(60) == 0
    _, alive = psutil.wait_procs(launched.left(), timeout=10)
    assert not alive, [process.cmdline() for process in alive]
    assert '"key": "alice"' in (tmp_path / "access.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_interrupted(launched: Launched) -> None:
    """T28: Ctrl-C while serving ends with 130 within 10 s, and nothing is left."""
    launched.until_serving()
    launched.process.send_signal(signal.SIGINT)
    assert launched.process.wait(15) == 130
    _, alive = psutil.wait_procs(launched.left(), timeout=10)
    assert not alive, [process.cmdline() for process in alive]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_start_that_fails(run_file: Path, tmp_path: Path) -> None:
    """T26 and T28: a start that cannot work ends with the exit code of its error, not in a loop of restarts."""
    made = Launched(run_file, "--set", "run.tls={certificate: nothing.pem, key: nothing.pem}", mark=tmp_path.name)
    try:
        _, text = made.process.communicate(timeout=120)
        assert made.process.returncode == 2, text
        assert "run.tls" in text
    finally:
        made.end()


BEHIND_PROXY = """
import json, sys, httpx
from ray import serve
from launch.backend import RayBackend
from launch.serve import build_app
from dist_infer.config import ClusterConfig
backend = RayBackend(ClusterConfig(executor="ray"), "tiny")
backend.start(1)
port = int(sys.argv[2])
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(build_app({"config": sys.argv[1], "overrides": ["run.port=8000"]}), name="tiny")
url, headers = f"http://127.0.0.1:{port}", {"authorization": "Bearer " + sys.argv[3]}
with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
    while http.get("/health/ready").status_code != 200:
        pass
    body = {"prompt": "x", "max_tokens": 4, "ignore_eos": True}
    found = {
        "tokens": http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"],
        "stream": http.post("/v1/completions", json={**body, "stream": True}).text[-14:],
        "statuses": [httpx.get(url + "/v1/models").status_code, http.post("/v1/completions", json={}).status_code],
    }
with open(sys.argv[4], "w") as file:
    json.dump(found, file)
serve.shutdown()
backend.close()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_behind_serves_own_proxy(run_file: Path, tmp_path: Path) -> None:
    """Guards `build_app`: the same app in a Serve with proxies answers, streams and refuses as on its own socket."""
    answers = tmp_path / "answers.json"
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", BEHIND_PROXY, str(run_file), str(port), KEY, str(answers)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "DIST_INFER_API_KEYS": f"alice={KEY}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(answers.read_text())
    assert found == {"tokens": 4, "stream": "data: [DONE]\n\n", "statuses": [401, 400]}


def test_beyond_this_machine_needs_keys(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards rule 7: an endpoint without keys is never reachable from elsewhere, and nothing is started for it."""
    from launch.runs.announce import Announcer
    from launch.runs.run import Run
    from launch.serve import build_app, serve_until_signal

    monkeypatch.delenv("DIST_INFER_API_KEYS", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        config = load_config(run_file, [f"run.host='{host}'"])
        assert config.run is not None
        with pytest.raises(ConfigError, match=r"run\.host"):
            serve_until_signal(config, config.run, Run(config, run_file, Announcer(None, None)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="API key"):
        build_app({"config": str(run_file)})
    with pytest.raises(ConfigError, match="args are"):
        build_app({"config": str(run_file), "key": "x"})
