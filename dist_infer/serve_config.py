"""The run file's `run` section with `kind: serve`: where the endpoint listens, for whom, and its limits."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from dist_infer.config_types import Count, Seconds, Section
from dist_infer.openai.dialect import ReasoningSetting, ToolSetting
from partition.sizes import parse_size

_SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([KMGTkmgt]?i?[Bb])?\s*$"},
    ],
    "format": "size, e.g. '512 MiB'",
}
_Size = Annotated[int, Field(ge=1), BeforeValidator(parse_size), WithJsonSchema(_SIZE_SCHEMA)]
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_LATEST_DRAIN_S = 3600.0


class ServeLimits(Section):
    """What a client may make the endpoint hold, and for how long."""

    max_body: _Size = Field(4 << 20, description="Bytes of a request's body; more is 413.")
    max_connections: Count = Field(1024, description="Open connections; one more gets 503 and is closed.")
    max_queued_requests: Annotated[int, Field(ge=0)] = Field(
        64, description="Answers that may wait beyond those that run (engine.max_requests); one more is 429."
    )
    max_queued_tokens: Count = Field(
        1_000_000, description="Prompt tokens that may wait for their first answer token; more is 429."
    )
    header_time: Seconds = Field(10.0, description="For all of a request's headers, from the connection's first byte.")
    body_time: Seconds = Field(30.0, description="For all of a request's body.")
    write_time: Seconds = Field(30.0, description="A client that reads nothing for so long is cut off.")
    idle_time: Seconds = Field(60.0, description="A connection without a request is closed after it.")
    queue_time: Seconds = Field(300.0, description="From a request's arrival to its first token; then it is 504.")
    request_time: Seconds = Field(1800.0, description="From a request's arrival to its end; then it is 504.")
    drain_time: Annotated[float, Field(ge=0, le=_LATEST_DRAIN_S)] = Field(
        30.0, description="Seconds that running requests have to finish after SIGTERM."
    )


class TlsConfig(Section):
    """HTTPS by the endpoint itself."""

    certificate: str = Field(min_length=1, description="PEM file with the certificate and its chain.")
    key: str = Field(min_length=1, description="PEM file with its private key.")


class ServeConfig(Section):
    """Serve the model over HTTP, as OpenAI's API, until SIGTERM or Ctrl-C."""

    kind: Literal["serve"]
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on. Other than loopback: needs keys.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="0: any that is free.")
    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,126}$")] | None = Field(
        None, description="What clients call the model. Without it: the run's name."
    )
    api_keys_file: str | None = Field(
        None,
        min_length=1,
        description="YAML, `name: {sha256, max_concurrent, requests_per_minute, priority}`; also from "
        "DIST_INFER_API_KEYS. A relative path is taken from the run file's directory.",
    )
    allowed_hosts: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="What the Host header may name. Empty: a loopback address answers to its own names, others to any.",
    )
    allowed_origins: list[Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+$")]] = Field(
        default=[],
        description="Other sites, `https://chat.example.org`, whose pages may call this endpoint (CORS). Empty: none.",
    )
    access_log: str | None = Field(
        None, min_length=1, description="A file that gets a JSON line per request; never prompts or answers."
    )
    log_file: str | None = Field(
        None,
        min_length=1,
        description="A file that gets a JSON line for all else the endpoint says, errors with their request's id; and "
        "the lines of access_log where that is not set.",
    )
    log_prompts: bool = Field(
        False, description="Write prompts and answers, and errors in full, to log_file. Off: they are in no log."
    )
    otlp_endpoint: str | None = Field(
        None,
        min_length=1,
        description="URL of an OpenTelemetry collector, e.g. http://127.0.0.1:4318: one span a request. Needs the "
        "extra `otel`.",
    )
    tool_format: ToolSetting = Field(
        "auto", description="How the model writes calls of tools. auto: as its chat template shows; none: it does not."
    )
    reasoning_format: ReasoningSetting = Field(
        "auto", description="How it marks its thought. auto: as its chat template shows; none: all is the answer."
    )
    limits: ServeLimits = ServeLimits()
    tls: TlsConfig | None = Field(None, description="Without it: HTTP.")

    @field_validator("allowed_hosts")
    @classmethod
    def _names_only(cls, names: list[str]) -> list[str]:
        for name in names:
            if "/" in name or "*" in name.lstrip("*."):
                raise ValueError(f"{name!r} is no host name: write `example.org`, `*.example.org` or `*`")
        return [name.lower() for name in names]

    @model_validator(mode="after")
    def _times_in_order(self) -> ServeConfig:
        if self.limits.queue_time > self.limits.request_time:
            raise ValueError("limits.queue_time is part of limits.request_time: it cannot be longer")
        return self

    @model_validator(mode="after")
    def _prompts_have_a_file(self) -> ServeConfig:
        if self.log_prompts and self.log_file is None:
            raise ValueError("log_prompts writes to log_file: name one")
        return self

    @property
    def is_local(self) -> bool:
        """Only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> tuple[str, ...]:
        """What the Host header may say, `*` for anything."""
        if self.allowed_hosts:
            return tuple(self.allowed_hosts)
        return (*_LOCAL_NAMES, self.host.lower()) if self.is_local else ("*",)
