"""How one request is sampled and when it ends. Checked completely at construction, before a request owns anything."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dist_infer.messages import SamplingSpec
from partition.errors import ConfigError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MIN_TEMPERATURE = 1e-5  # below it logits / temperature leaves float32
MAX_TEMPERATURE = 100.0
_SEED_BITS = 63


@dataclass(frozen=True, init=False)
class SamplingParams:
    """Keyword-only and immutable. Raises ConfigError with the field, what it got and what is allowed.

    max_tokens: new tokens at most; None: until the model length (or the KV cache) ends.
    temperature: 0 is greedy, else 1e-5 to 100.
    top_k: 0 or -1: off; else the k likeliest tokens.
    top_p: more than 0, at most 1 (off).
    seed: any signed 64-bit integer; None: the engine draws one.
    stop: a string or several; the text ends before the first that completes, and never shows a part of it.
    stop_token_ids: end like the end-of-sequence token does: in `token_ids`, not in `text`.
    ignore_eos: the end-of-sequence token is a token like any other.
    logprobs: None: none; 0: of the chosen token; n <= 20: and of the n likeliest.
    """

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None

    def __init__(
        self,
        *,
        max_tokens: int | None = 16,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Iterable[str] | None = (),
        stop_token_ids: Iterable[int] | None = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
    ) -> None:
        if max_tokens is not None:
            max_tokens = _integer("max_tokens", max_tokens, "a whole number from 1, or None", low=1)
        top_k = _integer("top_k", top_k, "a whole number from 1, or 0 or -1 for off", low=-1)
        if seed is not None:
            allowed = "a signed 64-bit integer, or None"
            seed = _integer("seed", seed, allowed, low=-(2**_SEED_BITS), high=2**_SEED_BITS - 1)
        if logprobs is not None:
            allowed = f"a whole number from 0 to {MAX_LOGPROBS}, or None"
            logprobs = _integer("logprobs", logprobs, allowed, low=0, high=MAX_LOGPROBS)
        if not isinstance(ignore_eos, bool):
            raise _refusal("ignore_eos", ignore_eos, "True or False")
        values = {
            "max_tokens": max_tokens,
            "temperature": _temperature(temperature),
            "top_k": max(top_k, 0),
            "top_p": _top_p(top_p),
            "seed": seed,
            "stop": _stop_strings(stop),
            "stop_token_ids": _stop_token_ids(stop_token_ids),
            "ignore_eos": ignore_eos,
            "logprobs": logprobs,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def spec(self, seed: int) -> SamplingSpec:
        """What the ranks need of it; `seed` is the one in force (ranks never draw), sent as a non-negative number."""
        return SamplingSpec(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=seed & (2**_SEED_BITS - 1),
            num_logprobs=self.logprobs,
        )


def _refusal(name: str, got: object, allowed: str) -> ConfigError:
    shown = repr(got)
    return ConfigError(f"{name} must be {allowed}, not {shown if len(shown) <= 80 else shown[:77] + '...'}")


def _integer(name: str, value: object, allowed: str, *, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise _refusal(name, value, allowed)
    return value


def _number(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(name, value, allowed)
    try:
        number = float(value)
    except OverflowError:
        raise _refusal(name, value, allowed) from None
    if not math.isfinite(number):
        raise _refusal(name, value, allowed)
    return number


def _temperature(value: object) -> float:
    allowed = f"0 (greedy) or a number from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
    number = _number("temperature", value, allowed)
    if number != 0 and not MIN_TEMPERATURE <= number <= MAX_TEMPERATURE:
        raise _refusal("temperature", value, allowed)
    return number


def _top_p(value: object) -> float:
    allowed = "a number above 0 and at most 1"
    number = _number("top_p", value, allowed)
    if not 0 < number <= 1:
        raise _refusal("top_p", value, allowed)
    return number


def _stop_strings(value: object) -> tuple[str, ...]:
    allowed = f"a non-empty string, or at most {MAX_STOP_STRINGS} of them, each of at most {MAX_STOP_CHARS} characters"
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise _refusal("stop", value, allowed)
    stops = tuple(value)
    if len(stops) > MAX_STOP_STRINGS:
        raise ConfigError(f"stop must be {allowed}, not {len(stops)} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise _refusal("stop", stop, allowed)
    return stops


def _stop_token_ids(value: object) -> tuple[int, ...]:
    allowed = f"at most {MAX_STOP_TOKEN_IDS} token ids, each a whole number from 0"
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise _refusal("stop_token_ids", value, allowed)
    ids = tuple(value)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise ConfigError(f"stop_token_ids must be {allowed}, not {len(ids)} ids")
    return tuple(_integer("stop_token_ids", token_id, allowed, low=0) for token_id in ids)
