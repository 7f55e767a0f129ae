"""What gets into logs: one JSON object a line, every error with its request's id, and nothing that clients wrote."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from observed import ALICE, ASK, KEY, KEYS
from served_model import Served, wait_until

from dist_infer import LLM
from dist_infer.errors import ClusterError, ConfigError
from dist_infer.openai.guard import CutOffError, Guard
from dist_infer.openai.keys import KeyRing
from dist_infer.openai.logs import ACCESS_LOG, JsonLines, LogFiles, described
from dist_infer.serve_config import ServeLimits

SECRET = "xyzzy-7719"


@pytest.fixture
def served(llm: LLM) -> Iterator[Served]:
    made = Served(llm, ServeLimits(), KEYS)
    yield made
    made.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[..., LogFiles]]:
    opened: list[LogFiles] = []

    def open_them(**names: Any) -> LogFiles:
        opened.append(LogFiles(**{"access_log": None, "log_file": None, "log_prompts": False, **names}))
        return opened[-1]

    yield open_them
    for each in opened:
        each.close()


def ask(served: Served, request_id: str, **changes: Any) -> httpx.Response:
    headers = {**ALICE, "x-request-id": request_id}
    body = {**ASK, "prompt": f"the {SECRET}", **changes}
    return httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=20)


def everything(served: Served, monkeypatch: pytest.MonkeyPatch) -> str:
    """Requests that end well, and in every kind of error; the text of the answer."""

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError(f"cannot encode {SECRET!r} for {KEY}")

    answer = ask(served, "good")
    assert answer.status_code == 200
    assert ask(served, "streamed", stream=True).status_code == 200
    assert ask(served, "refused", temperature=-1).status_code == 400
    assert httpx.post(f"{served.url}/v1/completions", json=ASK, headers={"authorization": SECRET}).status_code == 401
    with monkeypatch.context() as patch:
        patch.setattr(served.service, "in_thread", broken)
        assert ask(served, "broken").status_code == 500
        patch.undo()
        patch.setattr(served.service, "events", broken)
        assert ask(served, "broken-later", stream=True).status_code == 500
    return str(answer.json()["choices"][0]["text"])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_nothing_that_was_said_is_logged(
    served: Served,
    files: Callable[..., LogFiles],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Guards prompts, answers and keys against files and stderr, even where an error quotes them."""
    files(log_file=str(tmp_path / "all.log"))
    answer = everything(served, monkeypatch)
    wait_until(lambda: len([line for line in lines(tmp_path / "all.log") if "status" in line]) == 6)
    captured = capfd.readouterr()
    text = (tmp_path / "all.log").read_text(encoding="utf-8") + captured.err + captured.out
    for kept in (SECRET, KEY, answer, json.dumps(answer)[1:-1]):
        assert kept not in text
    found = lines(tmp_path / "all.log")
    assert all({"time", "level", "logger", "request_id"} <= line.keys() for line in found)
    errors = {line["request_id"]: line["message"] for line in found if line["level"] == "error"}
    assert set(errors) == {"broken", "broken-later"}
    assert all("ValueError" in message and "broken" in message for message in errors.values())  # its kind and its stack


def test_without_files_stderr_has_the_errors_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards the default: what would go to stderr names the request, and quotes nobody."""
    with caplog.at_level(logging.DEBUG, logger="dist_infer"):
        answer = everything(served, monkeypatch)
    text = caplog.text + capfd.readouterr().err
    for kept in (SECRET, KEY, answer):
        assert kept not in text
    failures = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert [message.split()[1] for message in failures] == ["broken", "broken-later"]


def test_prompts_are_logged_when_that_is_asked_for(
    served: Served, files: Callable[..., LogFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards run.log_prompts: question and answers under the request's id, and errors in their own words."""
    files(log_file=str(tmp_path / "all.log"), log_prompts=True)
    served.service.log_prompts = True
    answer = everything(served, monkeypatch)
    found = lines(tmp_path / "all.log")
    said = {line["request_id"]: line for line in found if line["logger"] == "dist_infer.prompts"}
    assert set(said) == {"good", "streamed"}
    assert (said["good"]["prompt"], said["good"]["answers"]) == (f"the {SECRET}", [answer])
    errors = [line["message"] for line in found if line["level"] == "error"]
    assert all("cannot encode" in message for message in errors)


def test_access_lines_have_a_file_of_their_own(served: Served, files: Callable[..., LogFiles], tmp_path: Path) -> None:
    """Guards the two files against each other's lines; with one name for both there is one file."""
    pair = files(access_log=str(tmp_path / "access.log"), log_file=str(tmp_path / "all.log"))
    ask(served, "one")
    wait_until(lambda: len(lines(tmp_path / "access.log")) == 1)
    assert lines(tmp_path / "all.log") == []
    (line,) = lines(tmp_path / "access.log")
    assert (line["request_id"], line["key"], line["output_tokens"]) == ("one", "alice", 6)
    assert 0 < line["ttft_ms"] <= line["duration_ms"]
    pair.close()
    files(access_log=str(tmp_path / "both.log"), log_file=str(tmp_path / "both.log"))
    ask(served, "two")
    wait_until(lambda: len(lines(tmp_path / "both.log")) == 1)
    assert len(lines(tmp_path / "access.log")) == 1


def test_a_file_that_cannot_be_written_is_named(files: Callable[..., LogFiles], tmp_path: Path) -> None:
    """Guards the start: nobody should find out later that there is no log."""
    for key in ("access_log", "log_file"):
        with pytest.raises(ConfigError, match=f"run.{key}: cannot write {tmp_path}"):
            files(**{key: str(tmp_path)})
    with pytest.raises(ConfigError, match=r"run\.log_file"):
        files(access_log=str(tmp_path / "access.log"), log_file=str(tmp_path))
    assert ACCESS_LOG.handlers == []  # the file that could be opened is not left behind
    assert ACCESS_LOG.propagate


def test_described_errors() -> None:
    """Guards causes: each with its stack; words of our own errors, but not of those that quote what was sent."""
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ClusterError("rank 3 was lost") from error
    except ClusterError as error:
        found = error
    text = described(found, with_text=False)
    assert "ClusterError: rank 3 was lost\nfrom\n" in text
    assert text.endswith("KeyError")
    assert SECRET in described(found, with_text=True)
    assert SECRET not in described(ConfigError(SECRET), with_text=False)
    record = logging.LogRecord("asyncio", logging.ERROR, "", 0, "a task failed", (), (KeyError, KeyError(SECRET), None))
    line = json.loads(JsonLines(with_text=False).format(record))
    assert (line["level"], line["message"], line["error"]) == ("error", "a task failed", "KeyError")


async def test_an_answer_that_breaks_off_says_nothing_more(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Guards the server's own log of what the app raises: it gets the request's id, not the error's words."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError(SECRET)

    async def nothing(_: Any = None) -> Any:
        return {}

    guard = Guard(app, keys=KeyRing(), hosts=("*",), service=served.service)
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/x", "headers": [(b"x-request-id", b"cut")]}
    with pytest.raises(CutOffError, match="request cut") as caught:
        await guard(scope, nothing, nothing)
    assert caught.value.__suppress_context__
    assert SECRET not in caplog.text
    assert "request cut failed" in caplog.text
