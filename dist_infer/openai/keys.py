"""API keys: who may call, how much at once and how often. Only their SHA-256 is kept, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dist_infer.openai.errors import bad_request, too_many, unauthorized
from dist_infer.openai.types import MAX_PRIORITY
from partition.errors import ConfigError
from partition.yaml_loader import parse_yaml

ENVIRONMENT = "DIST_INFER_API_KEYS"
MIN_KEY_CHARS = 16
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
_HASH = re.compile(r"^[0-9a-f]{64}$")
_MINUTE_S = 60.0


class _Entry(BaseModel):
    """What the file has for one name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sha256: str = Field(pattern=_HASH.pattern)
    max_concurrent: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    only_metrics: bool = False


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A name and the hash of its key. None: no limit of its own. priority: of its requests, and the most urgent (the
    lowest) that they may ask for. only_metrics: it opens nothing but `/metrics`."""

    name: str
    sha256: str
    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    priority: int | None = None
    only_metrics: bool = False


def priority_of(key: ApiKey | None, asked: int | None) -> int:
    """Of a request with this key that asks for `asked`. ApiError 400 for one more urgent than the key may be."""
    floor = None if key is None else key.priority
    if asked is None:
        return floor or 0
    if floor is not None and asked < floor:
        raise bad_request(f"`priority`: {asked} is more urgent than this key may be: {floor} or more", param="priority")
    return asked


@dataclass
class _Use:
    num_open: int = 0
    tokens: float = 0.0  # of the bucket of requests per minute
    filled_s: float = 0.0


class KeyRing:
    """The keys that are in force, and how much each is used now. Empty: everybody may call, under the name "".

    Used by the event loop's thread alone.
    """

    def __init__(self, keys: tuple[ApiKey, ...] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._clock = clock
        self._use = {key.name: _Use(tokens=float(key.requests_per_minute or 0), filled_s=clock()) for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def who(self, authorization: str | None) -> ApiKey | None:
        """Whose key it is; None where no keys are in force. ApiError 401."""
        if not self._keys:
            return None
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise unauthorized("an API key is needed: send the header `Authorization: Bearer KEY`")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for key in self._keys:  # all of them, whichever it is
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None:
            raise unauthorized("this API key is not known")
        return found

    @contextmanager
    def using(self, key: ApiKey | None) -> Iterator[None]:
        """One request of this key, until it ends. ApiError 429 when it has too many open, or came too often."""
        if key is None:
            yield
            return
        use = self._use[key.name]
        if key.max_concurrent is not None and use.num_open >= key.max_concurrent:
            raise too_many(f"this key has {use.num_open} requests open, which is all it may", "concurrency_limit", 1)
        if key.requests_per_minute is not None:
            self._fill(use, key.requests_per_minute)
            if use.tokens < 1:
                wait_s = (1 - use.tokens) * _MINUTE_S / key.requests_per_minute
                raise too_many(f"this key may send {key.requests_per_minute} requests a minute", "rate_limit", wait_s)
            use.tokens -= 1
        use.num_open += 1
        try:
            yield
        finally:
            use.num_open -= 1

    def _fill(self, use: _Use, per_minute: int) -> None:
        now_s = self._clock()
        use.tokens = min(float(per_minute), use.tokens + (now_s - use.filled_s) * per_minute / _MINUTE_S)
        use.filled_s = now_s


def load_keys(file: str | None, environment: Mapping[str, str]) -> tuple[ApiKey, ...]:
    """Of the file (names, each with what `_Entry` has) and of DIST_INFER_API_KEYS (`name=key,...`).

    Raises ConfigError with the place; no message has a key in it.
    """
    keys = [] if file is None else _of_file(file)
    keys += _of_environment(environment.get(ENVIRONMENT, ""))
    for what, values in (("name", [key.name for key in keys]), ("key", [key.sha256 for key in keys])):
        if len(set(values)) != len(values):
            raise ConfigError(f"api keys: a {what} is there twice, in {ENVIRONMENT} and run.api_keys_file together")
    return tuple(keys)


def _of_file(file: str) -> list[ApiKey]:
    try:
        data = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run.api_keys_file: cannot read {file}: {type(error).__name__}") from error
    except ConfigError as error:
        raise ConfigError(f"run.api_keys_file: {file} is {error}") from None
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"run.api_keys_file: {file} must be a mapping of names, each with {{sha256: ...}}")
    keys = []
    for name, value in data.items():
        try:
            entry = _Entry.model_validate(value)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise ConfigError(
                f"run.api_keys_file: {file}: {_checked_name(name)} {place}: {error.errors()[0]['msg']}; each name has "
                "sha256 (64 hex digits, as `printf %s KEY | sha256sum` prints) and may have max_concurrent, "
                "requests_per_minute, priority and only_metrics"
            ) from None
        keys.append(ApiKey(name=_checked_name(name), **entry.model_dump()))
    return keys


def _of_environment(text: str) -> list[ApiKey]:
    keys = []
    for number, part in enumerate(filter(None, (piece.strip() for piece in text.split(","))), start=1):
        name, separator, key = part.partition("=")
        if not separator:
            raise ConfigError(f"{ENVIRONMENT}: entry {number} is not name=key")
        _checked_name(name)
        if len(key) < MIN_KEY_CHARS:
            raise ConfigError(f"{ENVIRONMENT}: the key of {name} is shorter than {MIN_KEY_CHARS} characters")
        keys.append(ApiKey(name=name, sha256=hashlib.sha256(key.encode()).hexdigest()))
    return keys


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.match(name):
        raise ConfigError(f"api keys: {str(name)[:40]!r} is no name: letters, digits, dot, dash, underscore")
    return name
