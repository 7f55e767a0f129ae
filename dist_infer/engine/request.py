"""One request as the scheduler sees it. Only the scheduler writes to it; everybody else reads."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from dist_infer.messages import SamplingSpec
from dist_infer.sampling_params import SamplingParams


class RequestState(enum.Enum):
    """
    WAITING ──admit──> RUNNING ──────finish, abort──────> FINISHED
       ^                │  └─abort in flight─> ABORTING ──apply──^   (rewind: as apply, as preempt)
       └───preempt──────┘
    """

    WAITING = "waiting"  # owns no block
    RUNNING = "running"  # owns blocks
    ABORTING = "aborting"  # in flight: ranks still write into its blocks
    FINISHED = "finished"  # owns nothing, forgotten by the scheduler


@dataclass(kw_only=True, eq=False)
class Request:
    """Tokens known, tokens computed and blocks owned.

    `id` is what the ranks know it by and never comes back; `token_limit` is prompt and answer together. Lower
    `priority` is sooner; among equals the older one goes first. A request is in one step in flight at most
    (`in_flight_step`). The `num_sent_*` say what the ranks have been told; 0 tokens: they do not know the request.
    `siblings`: all answers to one prompt, itself too, where there are several; `fork_of`: the one whose rows it takes
    over in the step that is being filled.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sampling: SamplingSpec
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    token_limit: int = 0  # set when it is added
    arrival_index: int = 0  # set when it is added; lower is older
    state: RequestState = RequestState.WAITING
    token_ids: list[int] = field(default_factory=list)  # prompt, then answer
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_sent_tokens: int = 0
    num_sent_blocks: int = 0
    num_preemptions: int = 0
    in_flight_step: int | None = None
    siblings: tuple[Request, ...] = field(default=(), repr=False)
    fork_of: str | None = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.prompt_token_ids)

    def start_over(self) -> None:
        """What it has so far stays; nothing of it is computed, owned or known to anybody. The state is the caller's."""
        self.block_ids = []
        self.num_computed = 0
        self.num_sent_tokens = 0
        self.num_sent_blocks = 0
        self.in_flight_step = None
        self.fork_of = None

    @property
    def turn(self) -> tuple[int, int]:
        """Whose is lower goes first."""
        return self.priority, self.arrival_index

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """The target: how far the computed tokens have to catch up before a new token is sampled."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_to_compute(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_known_to_ranks(self) -> bool:
        return self.num_sent_tokens > 0

    @property
    def is_ready(self) -> bool:
        """It can go into the next step."""
        return self.state is RequestState.RUNNING and self.in_flight_step is None
