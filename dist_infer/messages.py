"""What crosses processes: plain frozen data, JSON on the wire, shared by engine and worker.

A request is sent to the ranks in full once (`NewRequest`), then only as diffs. Ranks keep, per request, its token ids
and block table; they decide nothing. `encode`/`decode` are the only wire format: no pickle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter

from dist_infer.grammar import Grammar
from dist_infer.vocabulary import Vocabulary
from offload.timeline import TimelineEvent

T = TypeVar("T")

NOT_FINITE = (
    "the model's logits for {} are not finite numbers: its weights are damaged, or its values leave the range of "
    "model.dtype (bfloat16 and float32 have the widest)"
)


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an answer must look like, and the ids that may end it once it does."""

    grammar: Grammar
    end_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """What the last stage needs of a request's sampling, in token ids alone; docs/sampling.md has the meanings.

    temperature 0 is greedy. `seed` is always set (by the coordinator). `bad_words` are token sequences; `held_back` are
    ids that cannot be drawn before the answer has `min_tokens`. The numbers of logprobs: None is none, 0 is of the
    token itself, n is of the n likeliest, too.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    seed: int = 0
    num_logprobs: int | None = None
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    held_back: tuple[int, ...] = ()
    num_prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request in full: the first time it is scheduled, or again after a preemption.

    With `fork_of` its first `num_computed` tokens are those of that request, which the ranks know in this step and have
    computed that far: the blocks these tokens fill are shared, the rows of the one they fill in part are copied, and
    `token_ids` are those that come after them. Without it `num_computed` is 0.
    """

    request_id: str
    token_ids: tuple[int, ...]  # prompt + tokens generated so far, from `num_computed` on
    block_ids: tuple[int, ...]
    sampling: SamplingSpec
    num_output_tokens: int = 0  # how many of token_ids were generated
    fork_of: str | None = None
    num_computed: int = 0


@dataclass(frozen=True, slots=True)
class RequestDiff:
    """What changed for a request the ranks already know."""

    request_id: str
    new_token_ids: tuple[int, ...]
    new_block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + num_tokens) of a request in one micro-batch; `sample`: its last token yields a new one."""

    request_id: str
    start: int
    num_tokens: int
    sample: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `finished` is applied first (a preempted request is in `finished`, later again in `new`).

    A unit computes the micro-batches in their order, all of them before it is let go, so a long prompt may be spread
    over several micro-batches of one step. `vocabulary`: in the first step that has a request with a grammar.
    `epoch`: of the gang that is meant; ranks of another refuse it.
    """

    step_id: int
    micro_batches: tuple[tuple[Chunk, ...], ...]
    new: tuple[NewRequest, ...] = ()
    diffs: tuple[RequestDiff, ...] = ()
    finished: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None
    epoch: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for batch in self.micro_batches for chunk in batch)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One new token of one request; logprobs are natural logarithms under the unmodified distribution.

    completes: it is part of the answer, and the request's grammar allows nothing after it. error: the request has
    failed, alone, and there is no token; is_fault: that was not the request's doing.
    """

    request_id: str
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    completes: bool = False
    error: str | None = None
    is_fault: bool = False


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the prompt's tokens at positions first, first + 1, ...: each one's logprob, and those of the n likeliest."""

    request_id: str
    first: int
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the last stage found out in a step: exactly one token for each chunk with `sample`."""

    step_id: int
    tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamReport:
    """Cumulative figures of one rank's streamer since it was ready. Bytes are bytes, seconds are wall-clock."""

    rank: int
    num_passes: int
    bytes_read: int  # from disk
    bytes_copied: int  # host -> device
    stall_s: float  # the loop waited for a unit
    busy_s: float  # the stage was working on steps, stalls included
    communication_s: float  # in tensor-parallel collectives, waiting for slower peers included
    compute_s: float  # busy_s less stalls and communication
    num_tokens: int
    stall_s_per_unit: dict[str, float] = field(default_factory=dict)
    num_read_retries: int = 0  # reads repeated after an error
    num_slow_reads: int = 0  # slower than 10 medians and than 100 ms


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass of one rank: its part of one step. Times are of the rank's `time.perf_counter`; see StreamReport."""

    step_id: int
    num_tokens: int
    num_sampled: int  # requests that got a token; equal to num_tokens in a pass that only decodes
    start_s: float
    end_s: float
    bytes_read: int
    bytes_copied: int
    stall_s: float
    communication_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class TimelineReport:
    """What one rank did since it was last asked. Adding `epoch_s` to its times makes them seconds since 1970."""

    rank: int
    epoch_s: float
    passes: tuple[PassRecord, ...]
    events: tuple[TimelineEvent, ...]
    num_dropped: int  # events that were lost because there were too many


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a rank found when it became ready; returned as a value, never written into a config."""

    rank: int
    host: str
    pid: int
    num_kv_blocks: int
    resident_bytes: int
    slot_bytes: int
    kv_bytes: int
    rss_bytes: int
    reader: str  # e.g. "threads, O_DIRECT"
    kernels: str  # what computes from encoded weights; empty where none are
    load_s: float
    sums: str = ""  # by what the tensor-parallel ranks add up, and why; empty for a rank alone


_adapters: dict[type[Any], TypeAdapter[Any]] = {}  # building one takes milliseconds


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Of a list of one message: the outermost type's config counts, and a dataclass cannot be given one here."""
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(tuple[kind], config=ConfigDict(ser_json_inf_nan="constants"))  # type: ignore[valid-type]
    return _adapters[kind]


def encode(message: Any) -> bytes:
    """JSON bytes of one of this module's dataclasses; NaN, Infinity and -Infinity as Python's json writes them."""
    return _adapter(type(message)).dump_json((message,))


def decode(kind: type[T], data: bytes) -> T:
    """The message of that kind; raises pydantic.ValidationError when the bytes are not one."""
    value: T = _adapter(kind).validate_json(data)[0]
    return value
