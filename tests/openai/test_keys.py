"""Who may call: every route without a key, with a wrong one, with the right one; limits; what key files may hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from dist_infer.errors import ConfigError
from dist_infer.openai.errors import ApiError
from dist_infer.openai.guard import OPEN_PATHS
from dist_infer.openai.keys import ApiKey, KeyRing, load_keys, priority_of

KEY = "sk-0123456789abcdef"
HASH = hashlib.sha256(KEY.encode()).hexdigest()
ALICE = ApiKey(name="alice", sha256=HASH)
RIGHT = {"authorization": f"Bearer {KEY}"}
WRONG: list[dict[str, str]] = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer wrong-wrong-wrong"},
    {"authorization": f"Basic {KEY}"},
    {"authorization": f"Bearer {HASH}"},  # the hash is no key
    {"authorization": "Bearer \u00e9"},
]


def test_every_route_needs_a_key(serve: Callable[..., Any]) -> None:
    """Guards each route there is, and whatever is added: only probes are open."""
    served = serve(keys=(ALICE,))
    routes = {(method, route.path) for route in served.app.routes for method in route.methods}
    assert len(routes) >= 11
    with httpx.Client(base_url=served.url) as http:
        for method, path in [*sorted(routes), ("GET", "/nothing"), ("POST", "/v1/nothing")]:
            for headers in WRONG:
                sent = {name: value.encode() for name, value in headers.items()}
                answer = http.request(method, path.replace("{name:path}", "tiny"), headers=sent)
                if path in OPEN_PATHS:
                    assert answer.status_code in (200, 405)
                    continue
                assert answer.status_code == 401, (method, path, headers)
                if method != "HEAD":
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            assert http.request(method, path.replace("{name:path}", "tiny"), headers=RIGHT).status_code != 401


def test_limits_of_a_key(serve: Callable[..., Any]) -> None:
    """Guards the two limits, that they are each key's own, and Retry-After."""
    other = "sk-another-0123456789"
    served = serve(
        keys=(
            ApiKey(name="alice", sha256=HASH, requests_per_minute=2),
            ApiKey(name="bob", sha256=hashlib.sha256(other.encode()).hexdigest()),
        )
    )
    with httpx.Client(base_url=served.url) as http:
        statuses = [http.post("/tokenize", json={"prompt": "x"}, headers=RIGHT) for _ in range(3)]
        assert [answer.status_code for answer in statuses] == [200, 200, 429]
        assert 1 <= int(statuses[-1].headers["retry-after"]) <= 30
        bob = {"authorization": f"Bearer {other}"}
        assert http.post("/tokenize", json={"prompt": "x"}, headers=bob).status_code == 200


def test_bucket_and_concurrency() -> None:
    """Guards the arithmetic: places come back at the end of a request, tokens with time."""
    now = 0.0
    key = ApiKey(name="a", sha256=HASH, max_concurrent=1, requests_per_minute=60)
    ring = KeyRing((key,), clock=lambda: now)
    with ring.using(key), pytest.raises(ApiError, match="open"), ring.using(key):
        pass
    for _ in range(59):
        with ring.using(key):
            pass
    with pytest.raises(ApiError, match="a minute") as refused, ring.using(key):
        pass
    assert refused.value.retry_after_s == pytest.approx(1.0)
    now = 1.0
    with ring.using(key):
        pass


def test_load_keys(tmp_path: Path) -> None:
    """Guards both sources together."""
    file = tmp_path / "keys.yaml"
    file.write_text(f"alice: {{sha256: {HASH}, max_concurrent: 2}}\n")
    alice, bob = load_keys(str(file), {"DIST_INFER_API_KEYS": "bob=sk-abcdefghijklmnop, "})
    assert alice == ApiKey(name="alice", sha256=HASH, max_concurrent=2)
    assert bob.sha256 == hashlib.sha256(b"sk-abcdefghijklmnop").hexdigest()
    assert load_keys(None, {}) == ()


@pytest.mark.parametrize(
    ("floor", "asked", "found"),
    [(None, None, 0), (None, -7, -7), (5, None, 5), (5, 5, 5), (5, 9, 9), (-5, None, -5), (-5, 3, 3), (5, 4, None)],
)
def test_priority_of_a_key(floor: int | None, asked: int | None, found: int | None) -> None:
    """Guards the floor: a key's requests have its priority, and may ask to wait longer, never to be sooner."""
    key = ApiKey(name="a", sha256=HASH, priority=floor)
    if found is None:
        with pytest.raises(ApiError, match="5 or more") as refused:
            priority_of(key, asked)
        assert (refused.value.status, refused.value.param) == (400, "priority")
    else:
        assert priority_of(key, asked) == found
    assert priority_of(None, asked) == (asked or 0)


def test_priority_over_http(serve: Callable[..., Any]) -> None:
    """Guards the way from the key to the request, on both routes."""
    served = serve(keys=(ApiKey(name="batch", sha256=HASH, priority=10),))
    with httpx.Client(base_url=served.url, headers=RIGHT, timeout=20) as http:
        for path, body in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            answers = [
                http.post(path, json={**body, "max_tokens": 1, "priority": priority}) for priority in (9, 10, None)
            ]
            assert [answer.status_code for answer in answers] == [400, 200, 200]
            assert answers[0].json()["error"]["param"] == "priority"


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("", "", "mapping"),
        ("- a", "", "mapping"),
        ("alice: secret", "", "alice"),
        ("alice: {sha256: short}", "", "sha256"),
        (f"alice: {{sha256: {HASH}, priority: -1001}}", "", "priority"),
        (f"alice: {{sha256: {HASH}, priority: low}}", "", "priority"),
        (f"alice: {{sha256: {HASH}, rpm: 3}}", "", "rpm"),
        (f"'a b': {{sha256: {HASH}}}", "", "no name"),
        (f"alice: {{sha256: {HASH}}}", f"bob={KEY}", "twice"),
        (f"alice: {{sha256: {HASH}}}", "alice=sk-another-0123456789", "twice"),
        (f"alice: {{sha256: {HASH}}}", "sk-another-0123456789", "name=key"),
        (f"alice: {{sha256: {HASH}}}", "bob=short", "shorter"),
    ],
)
def test_bad_keys(tmp_path: Path, text: str, environment: str, words: str) -> None:
    """Guards against a door that opens, or a key in a message, because a file was written wrong."""
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        load_keys(str(file), {"DIST_INFER_API_KEYS": environment})
    assert "sk-" not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("localhost:1", 200), ("LOCALHOST", 200), ("a.example.org", 200), ("example.org", 400),
     ("evil.org", 400), ("localhost.evil.org", 400), ("", 400), ("[::1", 400)],
)  # fmt: skip
def test_hosts(serve: Callable[..., Any], host: str, status: int) -> None:
    """Guards against a page that reaches a local endpoint under a name of its own (DNS rebinding)."""
    served = serve(hosts=("localhost", "*.example.org"))
    with httpx.Client(base_url=served.url) as http:
        answer = http.get("/v1/models", headers={"host": host.encode()})
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["type"] == "invalid_request_error"
