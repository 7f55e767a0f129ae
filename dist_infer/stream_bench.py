"""`dist-infer bench stream`: how near streamed decoding comes to what the disk gives, on this machine, in one run.

    sweep raw │ raw │ batch 1 │ raw │ batch 8 │ raw │ batch 32 │ raw │ batch 1 │ …      rounds of it, medians

Raw reads and decoding take turns, since disks are noisy: each round is compared with the raw reads next to it.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_infer.config import RunConfig
from dist_infer.llm import LLM
from dist_infer.sampling_params import SamplingParams
from dist_infer.startup import store_location
from dist_infer.stream_figures import (
    Measured,
    RankPasses,
    StreamRound,
    bound_by,
    measure_passes,
    median_round,
    round_figures,
    verdict,
)
from offload.raw_read import RawRate, RawRead
from partition.cost import predict
from partition.errors import ConfigError
from partition.plan import Plan

DEFAULT_BATCHES = (1, 8, 32)
_LEAST_NEW_TOKENS = 4  # one by the prefill, one in the pass that is timed from, two that count
_SWEEP_FACTOR = 3.0  # the sweep of all settings takes so many times a later measurement


@dataclass(frozen=True, kw_only=True)
class StreamBenchOptions:
    """batches: requests decoded together; None: 1, 8 and 32 as far as the plan allows. raw_s: seconds of each raw read.

    Raises ConfigError for what cannot be measured.
    """

    batches: tuple[int, ...] | None = None
    rounds: int = 3
    prompt_tokens: int = 16
    new_tokens: int = 8
    raw_s: float = 1.5

    def __post_init__(self) -> None:
        for flag, value, least in [
            ("--rounds", self.rounds, 1),
            ("--prompt-tokens", self.prompt_tokens, 1),
            ("--new-tokens", self.new_tokens, _LEAST_NEW_TOKENS),
            *(("--batch", batch, 1) for batch in self.batches or ()),
        ]:
            if value < least:
                raise ConfigError(f"{flag} {value} is too small: it must be at least {least}")
        if not 0 < self.raw_s <= 600:
            raise ConfigError(f"--raw-seconds {self.raw_s:g}: write a number above 0, at most 600")

    def check(self, config: RunConfig) -> None:
        """ConfigError for what the run file rules out, before anything is packed or started."""
        most = config.engine.max_requests
        if self.batches is not None and not isinstance(most, str) and max(self.batches) > most:
            raise ConfigError(
                f"--batch {max(self.batches)} is more than engine.max_requests, {most}: lower it or raise the key"
            )


@dataclass(frozen=True, kw_only=True)
class StreamBatch:
    """One batch size: its rounds, their medians, and what the plan's cost model said for it."""

    batch: int
    rounds: tuple[StreamRound, ...]
    median: StreamRound
    predicted_tokens_per_s: float
    predicted_seconds_per_pass: float
    predicted_bound_by: str
    achieved_of_predicted: float
    bound_by: str
    stall_s_per_unit: dict[str, float]  # seconds per pass, of the last round
    verdict: str


@dataclass(frozen=True, kw_only=True)
class StreamBench:
    """What was found. raw_sweep: all settings, the best first. raw: all measurements of this node, in order; beside
    each of them, raw_in_cache: reads that stay in the processor's cache.

    `pictures`: of each batch the last passes of every rank; not part of the JSON.
    """

    model_type: str
    dtype: str
    store: str
    host: str
    device: str
    reader: str
    num_ranks: int
    prompt_tokens: int
    new_tokens: int
    total_bytes: int
    resident_bytes: int
    planned_bytes_per_pass: int
    raw_is_direct: bool
    raw_sweep: tuple[RawRate, ...]
    raw: tuple[RawRate, ...]
    raw_in_cache: tuple[RawRate, ...]
    raw_assumed: dict[str, float]  # of other nodes: their rate as measured at the start
    batches: tuple[StreamBatch, ...]
    verdict: str
    pictures: tuple[tuple[int, tuple[RankPasses, ...]], ...]

    def as_dict(self) -> dict[str, Any]:
        document = asdict(self)
        del document["pictures"]
        return document


def bench_stream(
    llm: LLM, config: RunConfig, options: StreamBenchOptions, on_line: Callable[[str], None]
) -> StreamBench:
    """Measure a model that was started from `config` with `timeline=True` and has nothing else to do.

    on_line: what was found so far, for people. Raises the tree of dist_infer.errors; a ConfigError for a batch that the
    plan has no room for.
    """
    batches = _batches(llm.plan, llm.gang.num_kv_blocks, options)
    store = Path(store_location(config, llm.gang.model).directory)
    with RawRead(sorted(store.glob("*.bin"))) as raw:
        return _Bench(llm, raw, store, options, on_line).run(batches)


class _Bench:
    """One run over rounds and batches."""

    def __init__(
        self, llm: LLM, raw: RawRead, store: Path, options: StreamBenchOptions, on_line: Callable[[str], None]
    ) -> None:
        self._llm, self._raw, self._store, self._options, self._on_line = llm, raw, store, options, on_line
        plan, reports = llm.plan, llm.gang.reports
        here = socket.gethostname()
        self._remote = {
            rank.node: llm.gang.facts.nodes[rank.node].disk_bytes_per_s
            for rank in plan.ranks
            if reports[rank.rank].host != here
        }
        self._settle_bytes = sum(
            rank.num_slots * rank.slot_bytes for rank in plan.ranks if rank.node not in self._remote
        )
        self._rates: list[RawRate] = []
        self._in_cache: list[RawRate] = []

    def run(self, batches: Sequence[int]) -> StreamBench:
        sweep = self._raw.sweep(_SWEEP_FACTOR * self._options.raw_s)
        self._on_line(f"raw read: {_rate(sweep[0])}; slowest of {len(sweep)} settings {_rate(sweep[-1])}")
        rounds: dict[int, list[StreamRound]] = {batch: [] for batch in batches}
        last: dict[int, Measured] = {}
        before = self._measure_raw()
        for number in range(1, self._options.rounds + 1):
            for batch in batches:
                last[batch] = self._decode(batch, seed=number)
                after = self._measure_raw()
                found = round_figures(number, last[batch], self._raw_by_node(before, after))
                rounds[batch].append(found)
                before = after
                self._on_line(f"round {number}/{self._options.rounds}, batch {batch}: {_brief(found)}")
        done = tuple(self._batch(batch, rounds[batch], last[batch]) for batch in batches)
        plan, reports = self._llm.plan, self._llm.gang.reports
        return StreamBench(
            model_type=plan.model.model_type,
            dtype=plan.dtype,
            store=str(self._store),
            host=socket.gethostname(),
            device=plan.device,
            reader=", ".join(sorted({report.reader for report in reports})),
            num_ranks=len(plan.ranks),
            prompt_tokens=self._options.prompt_tokens,
            new_tokens=self._options.new_tokens,
            total_bytes=sum(unit.num_bytes for rank in plan.ranks for unit in rank.units),
            resident_bytes=sum(rank.resident_bytes for rank in plan.ranks),
            planned_bytes_per_pass=sum(rank.streamed_bytes_per_pass for rank in plan.ranks),
            raw_is_direct=self._raw.direct,
            raw_sweep=sweep,
            raw=tuple(self._rates),
            raw_in_cache=tuple(self._in_cache),
            raw_assumed={self._llm.gang.facts.nodes[node].name: rate for node, rate in self._remote.items()},
            batches=done,
            verdict=done[0].verdict,
            pictures=tuple((batch, last[batch].ranks) for batch in batches),
        )

    def _measure_raw(self) -> RawRate:
        self._rates.append(self._raw.measure(self._options.raw_s, self._settle_bytes))
        self._in_cache.append(self._raw.measure(self._options.raw_s, in_cache=True))
        return self._rates[-1]

    def _raw_by_node(self, before: RawRate, after: RawRate) -> dict[int, float]:
        here = (before.bytes_per_s + after.bytes_per_s) / 2
        return {rank.node: self._remote.get(rank.node, here) for rank in self._llm.plan.ranks}

    def _decode(self, batch: int, seed: int) -> Measured:
        """Answer `batch` random prompts greedily, each with all of its new tokens."""
        numbers = random.Random(f"{batch} {seed}")
        vocabulary = self._llm.plan.model.vocab_size
        prompts = [[numbers.randrange(vocabulary) for _ in range(self._options.prompt_tokens)] for _ in range(batch)]
        params = SamplingParams(temperature=0.0, max_tokens=self._options.new_tokens, ignore_eos=True)
        self._llm.timelines()  # what was before is another round's
        self._llm.generate(prompts, params)
        return measure_passes(self._llm.plan, self._llm.timelines(), self._llm.gang.reports, batch)

    def _batch(self, batch: int, rounds: Sequence[StreamRound], last: Measured) -> StreamBatch:
        plan, median = self._llm.plan, median_round(rounds)
        prediction = predict(
            plan.model,
            plan.ranks,
            self._llm.gang.facts,
            dtype=plan.dtype,
            batch=batch,
            steps_in_flight=min(batch, plan.max_steps_in_flight),
            max_batch_tokens=plan.max_batch_tokens,
        )
        return StreamBatch(
            batch=batch,
            rounds=tuple(rounds),
            median=median,
            predicted_tokens_per_s=prediction.decode_tokens_per_s,
            predicted_seconds_per_pass=prediction.seconds_per_pass,
            predicted_bound_by=prediction.bound_by,
            achieved_of_predicted=median.tokens_per_s / prediction.decode_tokens_per_s,
            bound_by=bound_by(median),
            stall_s_per_unit=last.stall_s_per_unit,
            verdict=verdict(median, last.stall_s_per_unit),
        )


def _batches(plan: Plan, num_kv_blocks: int, options: StreamBenchOptions) -> tuple[int, ...]:
    """The wished batch sizes, or the default ones as far as there is room. Raises ConfigError with the key to turn."""
    tokens = options.prompt_tokens + options.new_tokens
    if tokens > plan.max_model_len:
        raise ConfigError(
            f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens} are {tokens} tokens, "
            f"a sequence may have {plan.max_model_len}: lower them or raise engine.max_model_len"
        )
    per_request = -(-tokens // plan.block_tokens)
    # the scheduler keeps a spare block for each running request when it admits the next
    most = min(plan.max_requests, (num_kv_blocks + 1) // (per_request + 1))
    if options.batches is None:
        return tuple(dict.fromkeys(min(batch, max(1, most)) for batch in DEFAULT_BATCHES))
    if max(options.batches) > most:
        raise ConfigError(
            f"--batch {max(options.batches)}: the plan has room for {most} requests of {tokens} tokens at a time "
            f"(engine.max_requests {plan.max_requests}, {num_kv_blocks} KV blocks of {plan.block_tokens} tokens): "
            "lower --batch, or raise engine.max_requests or engine.kv_memory"
        )
    return tuple(dict.fromkeys(options.batches))


def _rate(rate: RawRate) -> str:
    return f"{rate.bytes_per_s / 1e9:.2f} GB/s with {rate.setting.name}"


def _brief(found: StreamRound) -> str:
    share = "" if found.percent_of_raw is None else f", {found.percent_of_raw:.0f} % of raw"
    return (
        f"{found.tokens_per_s:.2f} tok/s, {found.seconds_per_pass:.3f} s per pass, {found.bytes_per_s / 1e9:.2f} GB/s "
        f"of {found.raw_bytes_per_s / 1e9:.2f}{share}, stalls {found.stall_s:.3f} s"
    )
