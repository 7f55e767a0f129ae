"""The load generator against a small server that streams at a known pace and fails on order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import threading
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dist_infer.load.arrivals import Load, poisson_times
from dist_infer.load.client import Target, base_url, first_model, make_client
from dist_infer.load.figures import Spread, load_figures, percentile, read_slo
from dist_infer.load.prompts import prompts_of_file, random_prompts, read_lengths
from dist_infer.load.record import Record
from dist_infer.load.report import load_report
from dist_infer.load.run import Measured, run_load, warm_up
from launch import cli
from partition.errors import ClusterError, ConfigError

FIRST_S, GAP_S, NUM_PIECES = 0.05, 0.02, 4
USAGE = {"prompt_tokens": 10, "completion_tokens": 2 * NUM_PIECES}


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def piece(text: str, **choice: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, **choice}]})


@dataclass
class Server:
    """Answers each request in the next one of `ways`, over and over. `open_now`: requests that it is answering."""

    ways: tuple[str, ...] = ("good",)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    open_now: int = 0
    most_open: int = 0
    num_ended: int = 0
    url: str = ""
    _turn: Iterator[int] = field(default_factory=itertools.count)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:")), 0
                )
                body = await reader.readexactly(length)
                if head.startswith("GET"):
                    await self._plain(writer, 200, {"data": [{"id": "tiny"}]})
                    continue
                self.heads.append(head)
                self.bodies.append(json.loads(body))
                self.open_now += 1
                self.most_open = max(self.most_open, self.open_now)
                try:
                    if not await self._stream(writer, self.ways[next(self._turn) % len(self.ways)]):
                        return
                finally:
                    self.open_now -= 1
                    self.num_ended += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _plain(self, writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, way: str) -> bool:
        """Whether the connection stays."""

        async def send(data: bytes) -> None:
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()

        if way == "refuse":
            await self._plain(writer, 429, {"error": {"message": "queue full"}})
            return True
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        if way == "hang":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(30)
            return False
        await send(b": hello\n\n" + event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]}))
        await asyncio.sleep(FIRST_S)
        for index in range(NUM_PIECES):
            if way == "break" and index == 2:
                return False
            data = piece(f"word{index} ")
            await send(data[:9])  # a line may come in parts
            await send(data[9:])
            if index < NUM_PIECES - 1:
                await asyncio.sleep(GAP_S)
        if way == "fail":
            await send(event({"error": {"message": "the engine failed"}}) + b"data: [DONE]\n\n")
        elif way == "garbage":
            await send(b"data: {no json\n\n")
        else:
            usage = b"" if way == "no usage" else event({"choices": [], "usage": USAGE})
            await send(piece("", finish_reason="stop") + usage + (b"" if way == "cut" else b"data: [DONE]\n\n"))
        await send(b"")
        return True


@asynccontextmanager
async def serving(*ways: str) -> AsyncIterator[Server]:
    server = Server(ways or ("good",))
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


def target(server: Server, **settings: Any) -> Target:
    return Target(url=base_url(server.url), model="tiny", **settings)


async def measured(server: Server, load: Load, **settings: Any) -> Measured:
    async with make_client("secret", 10) as client:
        return await run_load(client, target(server, **settings), load, random_prompts(read_lengths("fixed:3"), 0))


async def test_figures_are_what_the_server_did() -> None:
    """Rule: TTFT, TPOT, ITL, E2E and tokens are those of a server whose pace is known, never less than its pace."""
    async with serving() as server:
        found = load_figures(await measured(server, Load(concurrency=2, max_requests=6)))
    last_s = FIRST_S + (NUM_PIECES - 1) * GAP_S
    assert (found.num_completed, found.errors, found.token_source) == (6, {}, "usage")
    assert (found.output_tokens, found.prompt_tokens) == (6 * 2 * NUM_PIECES, 60)
    for spread, least in (
        (found.ttft, FIRST_S),
        (found.itl, GAP_S),
        (found.tpot, (NUM_PIECES - 1) * GAP_S / (2 * NUM_PIECES - 1)),
        (found.e2e, last_s),
    ):
        assert spread is not None
        assert 0.95 * least <= spread.median <= 20 * least  # of order: a busy machine is slower, none is faster
    assert found.seconds >= 3 * last_s
    assert found.requests_per_s == pytest.approx(6 / found.seconds)
    assert found.total_tokens_per_s == pytest.approx((60 + found.output_tokens) / found.seconds)


async def test_what_is_sent() -> None:
    """Each request streams, asks for usage, carries the key and the extra fields; no two prompts are equal."""
    async with serving() as server:
        await measured(server, Load(concurrency=2, max_requests=4), max_tokens=7, extra={"temperature": 0})
        await measured(server, Load(concurrency=1, max_requests=1), api="completions", with_usage=False)
    first, last = server.bodies[0], server.bodies[-1]
    assert first["stream_options"] == {"include_usage": True}
    assert (first["model"], first["max_tokens"], first["stream"], first["temperature"]) == ("tiny", 7, True, 0)
    assert len({body["messages"][0]["content"] for body in server.bodies[:4]}) == 4
    assert "stream_options" not in last
    assert len(last["prompt"].split()) == 3
    assert "POST /v1/chat/completions" in server.heads[0]
    assert "POST /v1/completions" in server.heads[-1]
    assert "Bearer secret" in server.heads[0]


async def test_closed_loop_keeps_its_concurrency() -> None:
    """So many are open at once, never more, and each request is sent once."""
    async with serving() as server:
        result = await measured(server, Load(concurrency=3, max_requests=9))
    assert (server.most_open, len(server.bodies), len(result.records)) == (3, 9, 9)
    assert load_figures(result).peak_in_flight == 3


async def test_open_loop_does_not_wait_for_answers() -> None:
    """Rule: an open loop sends when a request is due: with answers of 0.1 s and 200 a second, many are open."""
    async with serving() as server:
        result = await measured(server, Load(rate_per_s=200, max_requests=12))
    assert server.most_open > 3
    assert [record.due_s for record in result.records] == list(itertools.islice(poisson_times(200, 0), 12))
    assert all(record.sent_s >= record.due_s for record in result.records)


async def test_duration_ends_the_load_and_answers_are_waited_for() -> None:
    """Requests that were begun count, so that long answers are not left out."""
    async with serving() as server:
        result = await measured(server, Load(rate_per_s=100, duration_s=0.1))
    assert result.records
    assert all(record.due_s < 0.1 for record in result.records)
    assert all(record.error is None for record in result.records)


async def test_errors_are_counted_by_kind() -> None:
    """Rule: each way to fail has its own name, keeps its details and never ends the run."""
    ways = ("good", "refuse", "break", "fail", "garbage", "cut", "no usage")
    async with serving(*ways) as server:
        result = await measured(server, Load(concurrency=1, max_requests=len(ways)))
    found = load_figures(result, {"ttft": 10.0})
    assert found.errors == {
        "HTTP 429": 1,
        "connection broken": 1,
        "error in the stream": 1,
        "not understood": 1,
        "stream cut off": 1,
    }
    assert (found.num_completed, found.token_source, found.good_share) == (2, "pieces", 2 / 7)
    assert "queue full" in result.records[1].detail
    assert "the engine failed" in result.records[3].detail


async def test_a_server_that_hangs_is_a_timeout() -> None:
    """Rule: every wait has a deadline."""
    async with serving("hang") as server:
        result = await measured(server, Load(concurrency=1, max_requests=1), timeout_s=0.2)
        assert result.records[0].error == "timeout"


async def test_nobody_there() -> None:
    """A refused connection is counted during a run, and ends a warm-up with a sentence."""
    async with serving() as server:
        pass
    result = await measured(server, Load(concurrency=1, max_requests=2))
    assert load_figures(result).errors == {"connection refused": 2}
    async with make_client(None, 5) as client:
        with pytest.raises(ClusterError, match="answers nothing: connection refused"):
            await warm_up(client, target(server), random_prompts(read_lengths("fixed:3"), 0), 1)
        with pytest.raises(ClusterError, match="is the server up"):
            await first_model(client, f"{server.url}/v1")


async def test_cancellation_closes_every_connection() -> None:
    """Guards against requests that go on at the server when the client was interrupted."""
    async with serving("hang") as server:
        task = asyncio.create_task(measured(server, Load(concurrency=3, duration_s=60)))
        async with asyncio.timeout(5):
            while server.open_now < 3:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert all("Server.answer" in repr(other) for other in others)  # nothing of the client's is left
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def test_poisson_times_have_the_rate() -> None:
    """Gaps are exponential: their mean and their deviation are 1 / rate, and the seed decides them."""
    times = list(itertools.islice(poisson_times(50, 1), 20_000))
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.05)
    assert times == list(itertools.islice(poisson_times(50, 1), 20_000))


def test_percentiles() -> None:
    """Linear between neighbours, exact at the ends."""
    assert [percentile([1.0, 2.0, 3.0, 5.0], at) for at in (0, 50, 75, 100)] == [1, 2.5, 3.5, 5]
    spread = Spread.of(float(value) for value in range(101))
    assert spread == Spread(mean=50, median=50, p90=90, p99=99, highest=100)
    assert Spread.of([]) is None


def test_goodput_counts_requests_that_meet_every_objective() -> None:
    """Failed requests and slow ones are not good; the time runs from when a request was due."""
    good = Record(due_s=0, sent_s=0, end_s=1, chunk_s=array("d", [0.1, 0.2, 0.3]), num_output_tokens=3)
    late = Record(due_s=0, sent_s=5, end_s=6, chunk_s=array("d", [5.1, 5.2, 5.3]), num_output_tokens=3)
    slow = Record(due_s=0, sent_s=0, end_s=9, chunk_s=array("d", [0.1, 8.1]), num_output_tokens=2)
    failed = Record(due_s=0, sent_s=0, end_s=0.1, error="HTTP 500")
    run = Measured(records=[good, late, slow, failed], seconds=10)
    found = load_figures(run, read_slo("ttft=500ms, tpot=1s"))
    assert (found.goodput_per_s, found.good_share) == (0.1, 0.25)
    assert load_figures(run).goodput_per_s is None
    assert load_figures(Measured(records=[], seconds=0)).ttft is None


@pytest.mark.parametrize("text", ["ttft", "ttft=5", "itl=5ms", "ttft=1s,ttft=2s", "ttft=-1s", "ttft=1x5s"])
def test_objectives_have_names_and_units(text: str) -> None:
    """A bare number would be taken for milliseconds by some and for seconds by others."""
    with pytest.raises(ConfigError, match="--slo"):
        read_slo(text)


@pytest.mark.parametrize(
    "text", ["64", "fixed:0", "fixed:x", "uniform:9:3", "uniform:1", "lognormal:5:-1", "normal:1:2"]
)
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--prompt-words"):
        read_lengths(text)


def test_prompt_lengths_follow_their_distribution() -> None:
    """fixed is exact, uniform stays inside, lognormal has its median."""

    def words(text: str, count: int = 400) -> list[int]:
        return [len(str(each).split()) for each in itertools.islice(random_prompts(read_lengths(text), 3), count)]

    assert set(words("fixed:7")) == {7}
    assert set(words("uniform:2:4")) == {2, 3, 4}
    assert statistics.median(words("lognormal:50:0.5")) == pytest.approx(50, rel=0.15)


def test_prompts_of_a_file_are_read_at_once_and_repeated(tmp_path: Path) -> None:
    """A bad line is known before any load; a short file is enough for a long run."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    found = list(itertools.islice(prompts_of_file(file, 0), 6))
    assert found.count("a") == 3
    bodies = [json.loads(Target(url="http://x/v1", model="m").body(question)) for question in found]
    assert {body["messages"][0]["content"] for body in bodies} == {"a", "b"}
    file.write_text("{}\n")
    with pytest.raises(ConfigError, match=":1"):
        prompts_of_file(file, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rate_per_s": 1, "concurrency": 1, "max_requests": 1},
        {"rate_per_s": 1},
        {"rate_per_s": 0, "max_requests": 1},
        {"rate_per_s": math.inf, "max_requests": 1},
        {"concurrency": -1, "max_requests": 1},
        {"concurrency": 1, "duration_s": math.nan},
    ],
)
def test_loads_that_cannot_be_run_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--"):
        Load(**settings)


def test_urls() -> None:
    """`/v1` is put where no path is; what is no endpoint is refused without showing a password."""
    assert base_url("http://h:1") == base_url("http://h:1/") == base_url("http://h:1/v1/") == "http://h:1/v1"
    assert base_url("https://h/openai/v1") == "https://h/openai/v1"
    for bad in ("h:1", "ftp://h", "http://user:pass@h", "http://h/?a=b", "http://[::1"):
        with pytest.raises(ConfigError) as caught:
            base_url(bad)
        assert "pass" not in str(caught.value)


@contextmanager
def served_in_a_thread(*ways: str) -> Iterator[Server]:
    """For the command, which has its own event loop."""
    ready, done = threading.Event(), asyncio.Event()
    found: list[tuple[Server, asyncio.AbstractEventLoop]] = []

    async def serve() -> None:
        async with serving(*ways) as server:
            found.append((server, asyncio.get_running_loop()))
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait(10)
    try:
        yield found[0][0]
    finally:
        found[0][1].call_soon_threadsafe(done.set)
        thread.join(10)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dist-infer", "bench", "serve", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_the_command_prints_figures_and_writes_a_page(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One JSON document on stdout; a page that fetches nothing, with well-formed drawings; the key is in neither."""
    page = tmp_path / "out.html"
    monkeypatch.setenv("MY_KEY", "very-secret")
    with served_in_a_thread("good", "refuse", "good") as server:
        code, out, err = command(
            server.url, "--concurrency", "2", "--max-requests", "6", "--slo", "ttft=10s", "--json", "--report", page,
            "--api-key-env", "MY_KEY", "--prompt-words", "uniform:2:5",
        )  # fmt: skip
    found = json.loads(out)
    assert code == 0, err
    assert (found["model"], found["num_requests"], found["errors"]) == ("tiny", 6, {"HTTP 429": 2})
    assert found["ttft"]["median"] >= 0.95 * FIRST_S
    assert len(server.bodies) == 7  # one of them to warm up
    assert "very-secret" in server.heads[0]
    text = page.read_text()
    assert "very-secret" not in text + out + err
    assert "http-equiv" not in text
    assert "src=" not in text
    pictures = text.split("<svg")[1:]
    assert len(pictures) == 7
    for picture in pictures:
        ElementTree.fromstring("<svg" + picture.split("</svg>")[0] + "</svg>")
    assert "429" in text
    assert "good requests a second" in text


@pytest.mark.slow
def test_ctrl_c_ends_the_command() -> None:
    """An interrupted load ends with 130, quickly, and closes what it had opened."""
    with served_in_a_thread("hang") as server:
        code = "from launch.entry import main; main()"
        arguments = ["bench", "serve", server.url, "--concurrency", "3", "--duration", "60", "--warmup", "0"]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
        deadline = threading.Event()
        for _ in range(1500):  # 30 s to start on a busy machine
            if server.open_now == 3 or process.poll() is not None:
                break
            deadline.wait(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
        assert (process.returncode, err.strip().splitlines()[-1]) == (130, "interrupted")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("http://127.0.0.1:1",), "--rate"),
        (("ftp://x", "--concurrency", "1", "--max-requests", "1"), "cannot be measured"),
        (("http://x", "--concurrency", "1", "--max-requests", "1", "--api", "images"), "--api"),
        (("http://x", "--concurrency", "1", "--max-requests", "1", "--extra", "[]"), "--extra"),
        (("http://x", "--concurrency", "1", "--max-requests", "1", "--extra", '{"stream": false}'), "--extra"),
        (("http://x", "--concurrency", "1", "--max-requests", "1", "--max-tokens", "0"), "--max-tokens"),
        (("http://x", "--concurrency", "1", "--max-requests", "1", "--timeout", "0"), "--timeout"),
        (("http://x", "--concurrency", "1", "--max-requests", "1", "--report", "/no/such/a.html"), "--report"),
    ],
)
def test_bad_usage_is_exit_code_2(
    command: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], words: str
) -> None:
    """Everything is checked before anything is sent."""
    code, _, err = command(*arguments)
    assert code == 2
    assert words in err


def test_a_page_of_nothing_but_failures() -> None:
    """Guards the drawings against runs without one answer."""
    run = Measured(records=[Record(due_s=0.0, sent_s=0.0, end_s=0.1, error="HTTP 503")], seconds=0.1)
    assert "HTTP 503" in load_report(run, load_figures(run), ["a <b>"])
    assert "a &lt;b&gt;" in load_report(run, load_figures(run), ["a <b>"])
