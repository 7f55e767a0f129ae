"""How one request is sampled and when it ends. Checked completely at construction, before a request owns anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dist_infer.counter_random import SEED_BITS, sample_seed
from dist_infer.grammar import Grammar
from dist_infer.messages import GrammarSpec, SamplingSpec
from partition.errors import ConfigError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MIN_TEMPERATURE = 1e-5  # below it logits / temperature leaves float32
MAX_TEMPERATURE = 100.0
MAX_SAMPLES = 128
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_REPETITION_PENALTY = 100.0
MAX_PENALTY = 2.0  # of presence and frequency


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
    min_p: 0 (off) to 1; drops tokens less likely than min_p times the likeliest.
    typical_p: more than 0, at most 1 (off); keeps the tokens whose surprise is nearest to the expected one.
    repetition_penalty: 0.01 to 100, 1 is off; divides (or multiplies, where negative) logits of tokens seen so far.
    presence_penalty, frequency_penalty: -2 to 2, 0 is off; off the logits of the answer's tokens, once or per use.
    logit_bias: {token id: -100 to 100}, added to the logits.
    bad_words: texts that cannot be completed, neither with nor without a space before them.
    min_tokens: before the answer has so many, no end-of-sequence token, stop token or stop string ends it.
    n: how many answers; they share the prompt's computation. best_of: of so many, the n likeliest per token.
    prompt_logprobs: like logprobs, for each token of the prompt but the first.
    grammar: what the answer must look like; docs/constrained.md.
    kept_special_token_ids: special tokens whose text is part of the answer's, where others are left out.
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
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    bad_words: tuple[str, ...]
    min_tokens: int
    n: int
    best_of: int | None
    prompt_logprobs: int | None
    grammar: Grammar | None
    kept_special_token_ids: tuple[int, ...]

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
        min_p: float = 0.0,
        typical_p: float = 1.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] | None = (),
        bad_words: str | Iterable[str] | None = (),
        min_tokens: int = 0,
        n: int = 1,
        best_of: int | None = None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
        kept_special_token_ids: Iterable[int] | None = (),
    ) -> None:
        if max_tokens is not None:
            max_tokens = _integer("max_tokens", max_tokens, "a whole number from 1, or None", low=1)
        top_k = _integer("top_k", top_k, "a whole number from 1, or 0 or -1 for off", low=-1)
        if seed is not None:
            allowed = "a signed 64-bit integer, or None"
            seed = _integer("seed", seed, allowed, low=-(2**SEED_BITS), high=2**SEED_BITS - 1)
        min_tokens = _integer("min_tokens", min_tokens, "a whole number from 0", low=0)
        if max_tokens is not None and min_tokens > max_tokens:
            raise ConfigError(f"min_tokens must be at most max_tokens, which is {max_tokens}, not {min_tokens}")
        n = _integer("n", n, f"a whole number from 1 to {MAX_SAMPLES}", low=1, high=MAX_SAMPLES)
        if best_of is not None:
            allowed = f"a whole number from n, which is {n}, to {MAX_SAMPLES}, or None"
            best_of = _integer("best_of", best_of, allowed, low=n, high=MAX_SAMPLES)
        if not isinstance(ignore_eos, bool):
            raise _refusal("ignore_eos", ignore_eos, "True or False")
        if grammar is not None and not isinstance(grammar, Grammar):
            raise _refusal("grammar", grammar, "a Grammar, or None")
        values = {
            "max_tokens": max_tokens,
            "temperature": _temperature(temperature),
            "top_k": max(top_k, 0),
            "top_p": _share("top_p", top_p),
            "seed": seed,
            "stop": _texts("stop", stop, MAX_STOP_STRINGS, MAX_STOP_CHARS),
            "stop_token_ids": _token_ids("stop_token_ids", stop_token_ids),
            "ignore_eos": ignore_eos,
            "logprobs": _num_logprobs("logprobs", logprobs),
            "min_p": _in_range("min_p", min_p, 0.0, 1.0),
            "typical_p": _share("typical_p", typical_p),
            "repetition_penalty": _in_range(
                "repetition_penalty", repetition_penalty, 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY
            ),
            "presence_penalty": _in_range("presence_penalty", presence_penalty, -MAX_PENALTY, MAX_PENALTY),
            "frequency_penalty": _in_range("frequency_penalty", frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
            "logit_bias": _logit_bias(logit_bias),
            "bad_words": _texts("bad_words", bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS),
            "min_tokens": min_tokens,
            "n": n,
            "best_of": best_of,
            "prompt_logprobs": _num_logprobs("prompt_logprobs", prompt_logprobs),
            "grammar": grammar,
            "kept_special_token_ids": _token_ids("kept_special_token_ids", kept_special_token_ids),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def num_samples(self) -> int:
        """How many answers are computed; `n` of them are given."""
        return self.n if self.best_of is None else self.best_of

    def spec(
        self,
        seed: int,
        *,
        index: int = 0,
        eos_token_ids: Iterable[int] = (),
        bad_words: Iterable[tuple[int, ...]] = (),
    ) -> SamplingSpec:
        """What the ranks need of it, for answer `index`.

        seed: the one in force (ranks never draw), sent as a non-negative number that is the answer's own. bad_words:
        `self.bad_words` as token ids, by whoever has a tokenizer.
        """
        ends = tuple(sorted(set(self.stop_token_ids) | (set() if self.ignore_eos else set(eos_token_ids))))
        ranked = self.num_samples > self.n
        return SamplingSpec(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=sample_seed(seed, index),
            num_logprobs=0 if ranked and self.logprobs is None else self.logprobs,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            bad_words=tuple(bad_words),
            min_tokens=self.min_tokens,
            held_back=ends if self.min_tokens else (),
            num_prompt_logprobs=self.prompt_logprobs if index == 0 else None,
            grammar=None if self.grammar is None else GrammarSpec(self.grammar, ends),
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


def _share(name: str, value: object) -> float:
    allowed = "a number above 0 and at most 1"
    number = _number(name, value, allowed)
    if not 0 < number <= 1:
        raise _refusal(name, value, allowed)
    return number


def _in_range(name: str, value: object, low: float, high: float) -> float:
    allowed = f"a number from {low:g} to {high:g}"
    number = _number(name, value, allowed)
    if not low <= number <= high:
        raise _refusal(name, value, allowed)
    return number


def _num_logprobs(name: str, value: object) -> int | None:
    allowed = f"a whole number from 0 to {MAX_LOGPROBS}, or None"
    return None if value is None else _integer(name, value, allowed, low=0, high=MAX_LOGPROBS)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    allowed = f"at most {MAX_LOGIT_BIASES} token ids, each with a number from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}"
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = value.items()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise _refusal("logit_bias", value, allowed)
    biases: dict[int, float] = {}
    for pair in value:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise _refusal("logit_bias", pair, allowed)
        bias = _number("logit_bias", pair[1], allowed)
        if abs(bias) > MAX_LOGIT_BIAS:
            raise _refusal("logit_bias", bias, allowed)
        biases[_integer("logit_bias", pair[0], allowed, low=0)] = bias
    if len(biases) > MAX_LOGIT_BIASES:
        raise ConfigError(f"logit_bias must be {allowed}, not {len(biases)} ids")
    return tuple(sorted(biases.items()))


def _texts(name: str, value: object, most: int, most_chars: int) -> tuple[str, ...]:
    allowed = f"a non-empty string, or at most {most} of them, each of at most {most_chars} characters"
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise _refusal(name, value, allowed)
    texts = tuple(value)
    if len(texts) > most:
        raise ConfigError(f"{name} must be {allowed}, not {len(texts)} strings")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= most_chars:
            raise _refusal(name, text, allowed)
    return texts


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    allowed = f"at most {MAX_STOP_TOKEN_IDS} token ids, each a whole number from 0"
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise _refusal(name, value, allowed)
    ids = tuple(value)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise ConfigError(f"{name} must be {allowed}, not {len(ids)} ids")
    return tuple(_integer(name, token_id, allowed, low=0) for token_id in ids)
