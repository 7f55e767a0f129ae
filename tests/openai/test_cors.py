"""Pages of other sites: none may call the endpoint unless the run file names them."""

from __future__ import annotations

import hashlib

import httpx
import pytest
from pydantic import ValidationError
from served_model import Served

from dist_infer import LLM
from dist_infer.openai.keys import ApiKey
from dist_infer.serve_config import ServeConfig, ServeLimits

OURS, THEIRS = "https://chat.example.org", "https://evil.example.org"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def test_off_by_default(served: Served) -> None:
    """Guards against any page that somebody visits talking to the model on their machine."""
    with httpx.Client(base_url=served.url) as http:
        answers = [
            http.options("/v1/chat/completions", headers={"origin": THEIRS, **PREFLIGHT}),
            http.get("/v1/models", headers={"origin": THEIRS}),
        ]
    assert all("access-control-allow-origin" not in answer.headers for answer in answers)
    assert answers[0].status_code == 405


def test_named_sites_alone(llm: LLM) -> None:
    """Guards both sides: a named site gets its preflight without a key and errors it can read, another one nothing."""
    key = ApiKey(name="alice", sha256=hashlib.sha256(b"sk-alice").hexdigest())
    served = Served(llm, ServeLimits(), (key,), origins=(OURS,))
    try:
        with httpx.Client(base_url=served.url) as http:
            preflight = http.options("/v1/models", headers={"origin": OURS, **PREFLIGHT})
            other = http.options("/v1/models", headers={"origin": THEIRS, **PREFLIGHT})
            refused = http.get("/v1/models", headers={"origin": OURS})
    finally:
        served.close()
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, OURS)
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, OURS)


@pytest.mark.parametrize("origin", ["*", "chat.example.org", "https://a.example/path"])
def test_what_is_no_origin(origin: str) -> None:
    """Guards against a setting that looks as if it worked."""
    with pytest.raises(ValidationError, match="allowed_origins"):
        ServeConfig(kind="serve", allowed_origins=[origin])
