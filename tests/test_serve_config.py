"""`run: {kind: serve}` as people write it: defaults, paths, limits, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_infer import load_config
from dist_infer.errors import ConfigError
from dist_infer.openai.tools import FORMATS
from dist_infer.openai.tools.reasoning import TAGS
from dist_infer.serve_config import ServeConfig

MODEL = {"path": "/nowhere"}


def serve_config(**run: Any) -> ServeConfig:
    found = load_config({"model": MODEL, "run": {"kind": "serve", **run}}).run
    assert isinstance(found, ServeConfig)
    return found


def test_defaults_are_for_this_machine() -> None:
    """Guards rule 7: nobody elsewhere reaches an endpoint of which nothing was said."""
    run = serve_config()
    assert run.is_local
    assert "*" not in run.hosts
    assert "localhost" in run.hosts


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.0.1", False), ("example.org", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_local(host: str, is_local: bool) -> None:
    """Guards what may be served without keys."""
    assert serve_config(host=host).is_local == is_local


def test_paths_are_those_of_the_file(tmp_path: Path) -> None:
    """Guards key and certificate files: relative to the run file, as every path."""
    run = {
        "kind": "serve",
        "api_keys_file": "keys.yaml",
        "access_log": "a.log",
        "tls": {"certificate": "c.pem", "key": "/k.pem"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": MODEL, "run": run}))
    found = load_config(tmp_path / "run.yaml").run
    assert isinstance(found, ServeConfig)
    assert found.api_keys_file == str(tmp_path / "keys.yaml")
    assert found.access_log == str(tmp_path / "a.log")
    assert found.tls is not None
    assert (found.tls.certificate, found.tls.key) == (str(tmp_path / "c.pem"), "/k.pem")


def test_survives_json() -> None:
    """Guards the way to the replica: a config that went through JSON is the same config."""
    config = load_config(
        {"model": MODEL, "run": {"kind": "serve", "limits": {"max_body": "1 MiB", "body_time": "2 s"}}}
    )
    assert load_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"prot": 1}, "unknown key `run.prot`; did you mean `port`"),
        ({"limits": {"max_bodi": 1}}, "unknown key `run.limits.max_bodi`; did you mean `max_body`"),
        ({"port": "x"}, "`run.port`"),
        ({"port": 70000}, "`run.port`"),
        ({"limits": {"max_body": 0}}, "`run.limits.max_body`"),
        ({"limits": {"queue_time": 5, "request_time": 1}}, "queue_time"),
        ({"allowed_hosts": ["http://x/"]}, "host name"),
        ({"tls": {"certificate": "c"}}, "missing key `run.tls.key`"),
        ({"model_name": "../x"}, "`run.model_name`"),
        ({"kind": "sreve"}, "'generate', 'serve'"),
    ],
)
def test_errors_name_the_key(run: dict[str, Any], words: str) -> None:
    """Guards messages about one kind of run against the names of the other."""
    with pytest.raises(ConfigError) as refused:
        serve_config(**run)
    assert words in str(refused.value)


def test_formats_are_those_there_are() -> None:
    """Guards run.tool_format and run.reasoning_format against names that nothing reads, and parsers nobody can name."""
    for name in ("auto", "none", *FORMATS):
        assert serve_config(tool_format=name).tool_format == name
    for name in ("auto", "none", *TAGS):
        assert serve_config(reasoning_format=name).reasoning_format == name
    for key in ("tool_format", "reasoning_format"):
        with pytest.raises(ConfigError, match=f"run.{key}"):
            serve_config(**{key: "hermess"})
