"""The run file's keys for logs and traces, through the endpoint that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from observed import ASK

from dist_infer import load_config
from dist_infer.errors import ConfigError
from dist_infer.metrics.scraped import read_scrape
from dist_infer.openai.endpoint import Endpoint, Status
from dist_infer.serve_config import ServeConfig


async def test_endpoint_with_a_log(streamed_config: dict[str, Any], tmp_path: Path) -> None:
    """Guards run.log_file and the labels that only the run file knows; what the connection refuses is counted too."""
    run = {"kind": "serve", "port": 0, "log_file": str(tmp_path / "all.log"), "limits": {"max_connections": 1}}
    config = load_config({**streamed_config, "run": run})
    assert isinstance(config.run, ServeConfig)
    endpoint = Endpoint(config, config.run, ())
    try:
        await endpoint.start(listen=True)
        status = Status(phase="loading")
        while status.phase == "loading":
            status = await endpoint.status(status)
        assert status.phase == "ready", status.error
        assert status.url is not None
        async with httpx.AsyncClient(base_url=status.url, timeout=20) as http:
            assert (await http.post("/v1/completions", json=ASK)).status_code == 200
            async with httpx.AsyncClient(base_url=status.url) as second:
                assert (await second.get("/health/live")).status_code == 503
            found = read_scrape((await http.get("/metrics")).text, 0.0)
        (build,) = found.labels("dist_infer_build_info")
        assert (build["executor"], build["tensor"], build["pipeline"]) == ("local", "1", "2")
        assert found.sum("dist_infer_http_refused_total", reason="too_many_connections") == 1
    finally:
        await endpoint.close()
    lines = [json.loads(line) for line in (tmp_path / "all.log").read_text().splitlines()]
    assert [line["path"] for line in lines if "path" in line] == ["/v1/completions", "/metrics"]


def test_prompts_need_a_file(streamed_config: dict[str, Any]) -> None:
    """Guards log_prompts against being an option that does nothing."""
    with pytest.raises(ConfigError, match="log_prompts writes to log_file"):
        load_config({**streamed_config, "run": {"kind": "serve", "log_prompts": True}})
