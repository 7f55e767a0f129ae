"""The OpenAPI document against the server: nothing that it allows or forbids ends in a 5xx or in another shape."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS, load_all_checks

# 300 by default (seconds); DIST_INFER_SCHEMA_EXAMPLES=2000 is the long run
EXAMPLES = int(os.environ.get("DIST_INFER_SCHEMA_EXAMPLES", "300"))
CHECKED = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
_TIMEOUT_S = 60
PATHS = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models/{name}"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), PATHS)
def test_no_example_breaks_it(serve: Callable[..., Any], method: str, path: str) -> None:
    """Guards against a 5xx, and an error of another shape or status than the document says."""
    served = serve(max_queued_requests=0)  # few answers at once: each example takes a moment
    load_all_checks()
    document = served.app.openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=served.url)
    checks = [CHECKS.get_one(name) for name in CHECKED]

    strategy = schema[path][method].as_strategy()

    @settings(
        max_examples=max(1, EXAMPLES // len(PATHS)),
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=strategy)
    def run(case: Any) -> None:
        case.call_and_validate(base_url=served.url, checks=checks, timeout=_TIMEOUT_S)

    run()
