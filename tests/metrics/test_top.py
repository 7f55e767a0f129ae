"""`dist-infer top`: its figures are differences of scrapes, and every way it can end has its exit code."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from observed import ALICE, ASK, KEY, METRICS_KEY, scrape_of, some_requests
from served_model import Served

from dist_infer.metrics.live import busy_s, frame
from dist_infer.metrics.scraped import read_scrape
from launch import cli

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """(exit code, stdout, stderr) of `dist-infer top …` in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dist-infer", "top", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_frame_is_what_happened_between(served: Served) -> None:
    """Guards rates, percentiles and the ranks' shares against totals, and the interval they are taken over."""
    before = read_scrape(scrape_of(served), 100.0)
    some_requests(served)
    after = read_scrape(scrape_of(served), 102.0)
    while busy_s(after) == busy_s(before):  # ranks are asked twice a second at most
        after = read_scrape(scrape_of(served), 102.0)
    found = frame(before, after, (before, after))
    assert (found.model, found.phase, found.seconds) == ("tiny", "ready", 2.0)
    assert found.output_tokens_per_s == 18 / 2.0
    assert found.num_refused == 1
    assert found.ttft is not None
    assert found.inter_token is not None
    assert 0 < found.inter_token[0] <= found.inter_token[1]
    assert [row.stage for row in found.ranks] == [0, 1]
    for row in found.ranks:
        assert row.bytes_per_s > 0
        shares = (row.stall_share, row.compute_share, row.network_share)
        assert sum(share or 0 for share in shares) == pytest.approx(1, abs=0.05)
        assert row.bound_by in ("disk", "compute", "network")
        assert row.bytes_by_tier["nvme"] > 0
    idle = frame(after, after, None)
    assert (idle.ttft, idle.output_tokens_per_s, idle.ranks[0].stall_share, idle.ranks[0].bound_by) == (
        None,
        0,
        None,
        "",
    )


def test_a_server_that_was_restarted_counts_from_nothing(served: Served) -> None:
    """Guards against negative rates."""
    text = scrape_of(served)
    name = "\ndist_infer_generated_tokens_total "
    before = read_scrape(text.replace(name, f"{name}9"), 0.0)
    after = read_scrape(text, 1.0)
    assert frame(before, after, None).output_tokens_per_s == after.sum("dist_infer_generated_tokens_total") > 0


def test_once_prints_an_interval(served: Served, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what people see: all of it from /metrics alone, with a key that opens nothing else."""
    monkeypatch.setenv("PROMETHEUS_KEY", METRICS_KEY)
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            httpx.post(f"{served.url}/v1/completions", json=ASK, headers=ALICE, timeout=20)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        code, out, err = command(f"{served.url}/v1", "--once", "--interval", "1", "--key-env", "PROMETHEUS_KEY")
    finally:
        stop.set()
        thread.join(20)
    assert (code, err) == (0, "")
    for words in ("tiny", "ready", "running", "out/s", "KV cache", "p99", "nvme", "GB/s", "bound by", "KiB"):
        assert words in out
    assert "0.0 out/s" not in out
    assert "none in this interval" not in out
    assert METRICS_KEY not in out


@pytest.fixture
def other_server(tmp_path: Path) -> Iterator[str]:
    """Something else that speaks HTTP: a page at /metrics, another's metrics at /other/metrics."""
    (tmp_path / "metrics").write_text("<html>hello</html>")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics").write_text("# TYPE up gauge\nup 1\n")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """The test's output is no log."""

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Quiet(*arguments, directory=str(tmp_path))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_errors_say_what_to_do(
    served: Served, command: Command, other_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the exit codes: 4 when nothing answers, 2 for keys, other servers and wrong options."""
    monkeypatch.delenv("DIST_INFER_API_KEY", raising=False)
    cases = [
        (["http://127.0.0.1:9"], 4, "does not answer"),
        ([served.url], 2, "DIST_INFER_API_KEY is not set"),
        ([other_server], 2, "not a dist-infer endpoint"),
        ([f"{other_server}/other"], 2, "not of a dist-infer endpoint"),
        ([f"{other_server}/nothing"], 2, "answered 404"),
        (["127.0.0.1:8000"], 2, "write e.g. http://127.0.0.1:8000"),
        (["ftp://127.0.0.1"], 2, "cannot be watched"),
        ([served.url, "--interval", "0"], 2, "--interval"),
    ]
    for arguments, expected, words in cases:
        code, out, err = command(*arguments, "--once")
        assert (code, out) == (expected, ""), (arguments, err)
        assert words in err
        assert err.startswith("error: ")
    monkeypatch.setenv("DIST_INFER_API_KEY", "sk-wrong-0123456789")
    code, _, err = command(served.url, "--once")
    assert (code, "is not the right one" in err, "sk-wrong" in err) == (2, True, False)


def test_ctrl_c_ends_it(served: Served) -> None:
    """Guards the live view: frame after frame, until it is interrupted."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "top", served.url, "--interval", "0.5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DIST_INFER_API_KEY": KEY},
    )
    assert process.stdout is not None
    num_frames = 0
    for line in process.stdout:
        num_frames += "dist-infer" in line
        if num_frames == 2:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (num_frames, process.returncode, err) == (2, 130, "interrupted\n")
